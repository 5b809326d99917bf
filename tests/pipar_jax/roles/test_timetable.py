"""Rounds made one by one are those of the schedule; who was away goes on where it was."""

from __future__ import annotations

import itertools

import pytest

from pipar_jax.config import Config
from pipar_jax.roles.timetable import Timetable, Turn, next_steps
from pipar_jax.schedule import actions
from pipar_jax.schedule.plan import DevicePlan, HandOn, Order, Plan, WeightPolicy
from pipar_jax.schedule.rounds import rounds

DEVICE = DevicePlan((1,), ("device", "server"))
PLANS = [
    Plan((DEVICE,) * 3),
    Plan((DEVICE,) * 3, aggregate_every=4),
    Plan((DEVICE,) * 3, aggregate_every=4, weights=WeightPolicy.SHARED),
    Plan((DEVICE,) * 3, order=Order.SEQUENTIAL, weights=WeightPolicy.SHARED),
    Plan((DEVICE,) * 3, order=Order.SEQUENTIAL, weights=WeightPolicy.SHARED, hand_on=HandOn.STEP),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("steps", [(5, 5, 5), (3, 7, 1)])
def test_with_everybody_there_the_rounds_are_those_of_the_schedule(plan, steps):
    config = Config(epochs=3)
    table, at, found = (
        Timetable(config.epochs, config.run.rounds, plan, steps),
        dict.fromkeys(range(3), 0),
        [],
    )
    for index in range(table.rounds):
        found.append(table.spans(index, [Turn(p, at[p], steps[p]) for p in range(3)]))
        at |= next_steps(found[-1])
    assert tuple(found) == rounds(plan, steps, 3)
    assert {p: table.steps(steps[p]) for p in range(3)} == at


def test_who_was_away_goes_on_with_its_own_next_step():
    table = Timetable(5, 0, PLANS[0], (4, 4, 4))
    spans = table.spans(3, [Turn(0, 12, 4), Turn(2, 4, 4)])
    assert spans == (actions.Span(0, 12, 16), actions.Span(2, 4, 8))


def test_summed_gradients_have_one_step_for_all():
    table = Timetable(5, 0, PLANS[2], (8, 8, 8))
    assert table.spans(2, [Turn(0, 8, 8), Turn(1, 4, 8)]) == (
        actions.Span(0, 8, 12), actions.Span(1, 8, 12),
    )  # fmt: skip


def test_the_number_of_rounds_can_be_given():
    config = Config(epochs=1)
    config.run.rounds = 7
    for plan in PLANS:
        table = Timetable(config.epochs, config.run.rounds, plan, (4, 4, 4))
        assert table.rounds == 7 and table.steps(4) == 28


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("given", [0, 1, 3, 9])
@pytest.mark.parametrize("steps", [(5, 5, 5), (3, 7, 1)])
def test_epochs_are_what_the_rounds_pass_over(plan, given, steps):
    """However many rounds there are, and however long one is."""
    table, longest = Timetable(2, given, plan, steps), max(steps)
    taken = [0]
    for index in range(table.rounds):
        taken.append(taken[-1] + table.length(index, longest))
    assert [table.epochs(n) for n in range(table.rounds + 1)] == pytest.approx(
        [steps / longest for steps in taken]
    )
    assert table.epochs(table.rounds) == pytest.approx(table.steps(longest) / longest)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("steps", [(5, 5, 5), (3, 7, 1)])
@pytest.mark.parametrize("parts", [(1, 2), (1, 2, 3), (1, 3), (2, 5)])
def test_a_run_that_is_made_longer_takes_all_of_its_steps(plan, steps, parts):
    """Also where the last round of a part is shorter: the next one begins where that has ended."""
    ends, first, taken, longest = [], 0, [0], max(steps)
    for epochs in parts:
        table = Timetable(epochs, 0, plan, steps, ends)
        lengths = [table.length(index, longest) for index in range(table.rounds)]
        assert lengths[:first] == [b - a for a, b in itertools.pairwise(taken)]
        for length in lengths[first:]:
            assert 0 < length <= table.length(table.widest, longest)
            taken.append(taken[-1] + length)
        assert taken[-1] == table.steps(longest) == epochs * longest
        assert [table.epochs(n) * longest for n in range(table.rounds + 1)] == pytest.approx(taken)
        first, ends = table.rounds, table.ends_after(table.rounds)


def test_a_part_that_ends_within_a_run_leaves_its_rounds_as_they_are():
    whole = Timetable(3, 0, PLANS[1], (5, 5, 5))
    for over in range(whole.rounds):
        assert whole.ends_after(over) == []
    assert whole.ends_after(whole.rounds) == [[4, 15]]
    longer = Timetable(0, 6, PLANS[1], (5, 5, 5), [[4, 15]])
    assert [longer.length(index, 5) for index in range(6)] == [4, 4, 4, 3, 4, 4]
    assert (longer.steps(5), longer.widest) == (23, 4)
