"""What hosts learn of the length of a run when they prepare is theirs for the whole of it."""

from __future__ import annotations

import json

import pytest

from pipar_jax.roles.admission import Identity
from pipar_jax.roles.population import Population
from pipar_jax.roles.prepared_steps import PreparedSteps

PLACES = 4


def joined(*devices: tuple[int, int]) -> Population:
    """Devices by index and steps, in the order in which they join."""
    made = Population()
    for index, steps in devices:
        made.join(Identity(f"d{index}", 7 * steps, steps), 0.0)
    return made


@pytest.mark.parametrize("sampled", [False, True])
def test_who_joins_later_changes_nothing_for_others_even_after_a_resume(sampled: bool) -> None:
    population = joined((1, 4), (2, 3))
    before = PreparedSteps(population, PLACES, sampled=sampled, kept=None)
    first = {name: before.of(name) for name in ("server", "d1", "d2")}
    population.join(Identity("d0", 63, 9), 1.0)
    late = before.of("d0")
    assert first["server"] == ([4] * 4 if sampled else [4, 4, 3, 4])
    assert late == ([9] * 4 if sampled else [9, 4, 3, 9])
    kept = json.loads(json.dumps(before.facts))
    # All are there at once, in another order, and one more; d2 has not come back yet.
    again = joined((3, 20), (0, 9), (1, 4))
    again.recall(population.records(), 2.0)
    after = PreparedSteps(again, PLACES, sampled=sampled, kept=kept)
    assert after.of("d3") == ([20] * 4 if sampled else [9, 4, 3, 20])
    assert {name: after.of(name) for name in first} == first
    assert after.of("d0") == late == before.of("d0")


def test_a_device_that_comes_back_with_other_steps_is_told_of_its_own() -> None:
    population = joined((0, 4), (1, 4))
    prepared = PreparedSteps(population, 2, sampled=False, kept=None)
    assert prepared.of("d1") == [4, 4]
    population.join(Identity("d1", 35, 5), 1.0)
    assert prepared.of("d1") == [4, 5]


def test_a_checkpoint_from_before_they_were_kept_knows_all_devices() -> None:
    prepared = PreparedSteps(joined((0, 4), (2, 9)), 3, sampled=False, kept=None)
    assert prepared.of("server") == [4, 9, 9]
