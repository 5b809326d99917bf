"""A profile as a value: it serialises, interpolates and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pipar_jax.cost_model.profile import HostProfile, Profile, interpolate
from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.simulator.predict import HostTimes, StageCosts, estimate
from tests.pipar_jax.tuner.profiles import device, host, profile

#: What a rest adds to the forward, backward and update of each of five units.
RESTED = tuple((0.1 * i, 0.2 * i, 0.3 * i) for i in range(5))


def test_a_profile_survives_json():
    rested = dataclasses.replace(device("none"), host=resting())
    made = profile(device("4g", 3.0), rested)
    assert Profile.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("change", [{"units": None}, {"batch_size": ...}, {"nonsense": 1}])
def test_what_is_no_profile_is_refused(change):
    values = profile(device()).to_dict() | change
    values = {key: value for key, value in values.items() if value is not ...}
    with pytest.raises(PlanError, match="not a profile"):
        Profile.from_dict(values)


def test_tables_must_fit_the_model_and_their_sizes():
    with pytest.raises(PlanError, match="5 units"):
        dataclasses.replace(profile(device()), server=host(units=4))
    with pytest.raises(PlanError, match="sizes"):
        dataclasses.replace(host(), sizes=(25, 5, 100))
    with pytest.raises(PlanError, match="a time for each"):
        dataclasses.replace(host(), sizes=(5, 25))
    for rows in (((0.1, 0.2, 0.3),) * 4, ((0.1, 0.2),) * 5):
        with pytest.raises(PlanError, match="three times after a rest"):
            dataclasses.replace(host(), after_rest_s=rows)
    with pytest.raises(PlanError, match="at least one device"):
        profile()


@pytest.mark.parametrize(
    ("samples", "seconds"),
    [(4, 1.0), (8, 2.0), (6, 1.5), (10, 3.0), (16, 6.0), (2, 0.5), (1, 0.25)],
)
def test_times_between_and_beyond_the_sizes_measured(samples, seconds):
    assert interpolate((4, 8, 12), (1.0, 2.0, 4.0), samples) == pytest.approx(seconds)


def test_noise_never_makes_small_micro_batches_cheap_or_large_ones_quick():
    assert interpolate((10, 20), (1.0, 3.0), 4) == pytest.approx(0.4)
    assert interpolate((10, 20), (3.0, 2.0), 40) == pytest.approx(2.0)
    assert interpolate((10,), (1.0,), 25) == pytest.approx(2.5)


def test_a_stage_of_several_units_is_called_once():
    one, call_s = host(), 1e-4
    times = HostTimes(one)
    alone = sum(row[-1] for row in one.forward_s[:3])
    assert times.time_s("F", 0, 3, 100) == pytest.approx(alone - 2 * call_s)
    fused = sum(row[-1] for row in (*one.forward_s[2:], *one.backward_s[2:]))
    assert times.time_s("L", 2, 5, 100) == pytest.approx(fused - 4 * call_s)


def resting() -> HostProfile:
    return dataclasses.replace(host(), after_rest_s=RESTED)


def test_after_a_rest_every_unit_of_a_stage_is_fetched_anew():
    times = HostTimes(resting())
    assert times.rests and not HostTimes(host()).rests
    assert times.after_rest_s("F", 1, 3) == pytest.approx(0.1 + 0.2)
    assert times.after_rest_s("B", 1, 3) == pytest.approx(0.2 + 0.4)
    assert times.after_rest_s("U", 1, 3) == pytest.approx(0.3 + 0.6)
    assert times.after_rest_s("L", 3, 5) == pytest.approx(0.3 + 0.6 + 0.4 + 0.8)
    assert HostTimes(host()).after_rest_s("L", 3, 5) == 0.0
    slowed = HostTimes(resting().slowed(10.0))
    assert slowed.after_rest_s("U", 1, 3) == pytest.approx(9.0)


def test_a_rest_costs_what_the_rested_host_says():
    """The device rests while the server computes, the server has never rested for long."""
    plan = Plan((DevicePlan((2,), ("device", "server"), 1),))
    rested = dataclasses.replace(device("none", samples=100), host=resting())
    with_s, without_s = (
        estimate(StageCosts(profile(one)), plan).epoch_s
        for one in (rested, device("none", samples=100))
    )
    assert with_s - without_s == pytest.approx(0.1 + 0.2 + 0.3)  # unit 1 of units 0 and 1


def test_slowness_stretches_every_time():
    slow = host().slowed(10.0)
    quick, slowed = HostTimes(host()), HostTimes(slow)
    for kind, samples in (("F", 30), ("B", 30), ("U", 0), ("L", 100)):
        assert slowed.time_s(kind, 1, 5, samples) == pytest.approx(
            10 * quick.time_s(kind, 1, 5, samples)
        )
