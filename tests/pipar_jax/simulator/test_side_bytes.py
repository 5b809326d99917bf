"""Side inputs and targets count in the bytes that are predicted, where they cross and as often."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pipar_jax.cost_model.profile import Profile
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.simulator.predict import HEADER_BYTES, StageCosts
from pipar_jax.tuner.bounds import memory_bytes
from tests.pipar_jax.tuner import profiles

SAMPLES = 10
SIDES = {"lengths": 4.0, "mask": 50.0}
#: The mask is taken by unit 1, the lengths by units 3 and 4.
TAKEN = [(), ("mask",), (), ("lengths",), ("lengths",)]


def sided() -> Profile:
    """A profile of five units, two of whose targets have 4 and 8 bytes per sample."""
    base = profiles.profile(profiles.device(), nodes=(profiles.node(),))
    units = [dataclasses.replace(u, sides=s) for u, s in zip(base.units, TAKEN, strict=True)]
    return dataclasses.replace(base, units=tuple(units), side_bytes=SIDES, target_bytes=(4.0, 8.0))


@pytest.mark.parametrize(
    ("hosts", "cuts", "expected"),
    [
        # What is beside each boundary's activation: bytes per sample, and messages.
        (("device", "server"), (1,), [(12 + 54, 4)]),
        (("device", "server"), (2,), [(12 + 4, 3)]),
        (("device", "n1", "server"), (1, 3), [(12 + 54, 4), (12 + 4, 3)]),
        (("device", "n1", "device"), (1, 3), [(50, 1), (0, 0)]),
        (("device", "n1", "device"), (1, 4), [(54, 2), (0, 0)]),
    ],
)
def test_what_crosses_a_boundary_is_in_its_bytes(
    hosts: tuple[str, ...], cuts: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    whole = sided()
    stages = StageCosts(whole)
    costs = stages.costs(Plan((DevicePlan(cuts, hosts, 1),)))
    for stage, (per_sample, messages) in enumerate(expected):
        found = costs.wire_bytes(0, stage, "SF", SAMPLES)
        beside = per_sample * SAMPLES + (messages + 1) * HEADER_BYTES
        assert found == pytest.approx(stages.cut_bytes(cuts[stage], SAMPLES) + beside)


def test_they_count_in_the_memory_of_who_receives_them() -> None:
    plan = Plan((DevicePlan((1,), ("device", "server"), 4),))
    bare = profiles.profile(profiles.device(), nodes=(profiles.node(),))
    without = memory_bytes(StageCosts(bare), plan)
    found = memory_bytes(StageCosts(sided()), plan)
    assert found["server"] > without["server"] and found["d0"] == without["d0"]


def test_a_profile_keeps_them_in_its_file() -> None:
    whole = sided()
    assert Profile.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
