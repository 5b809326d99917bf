"""method=auto: hosts and links are measured after admission, and the best plan is trained."""

from __future__ import annotations

import pytest

from pipar_jax.cost_model.profile import NO_HANDLING, Profile
from pipar_jax.errors import PlanError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.predictor.online import Learner
from pipar_jax.roles import first_plan
from pipar_jax.roles.survey import numbers_of_plans
from pipar_jax.schedule.plan import Plan
from pipar_jax.tuner import tune
from pipar_jax.tuner.bounds import DeviceOption
from tests.pipar_jax.runtime import support

SAMPLES = (17, 33)


def setting(folder, **tuner):
    made = support.config(folder, SAMPLES, method="auto", dtype="float32")
    made.devices.defaults.link = "24/48/4ms"
    made.devices.overrides = {1: {"slowdown": 20.0}}
    made.tuner.sizes, made.tuner.methods = "2,7", "fl,sfl,pipar"
    made.tuner.codecs = "raw"  # all plans train the same
    for name, value in tuner.items():
        setattr(made.tuner, name, value)
    return made


@pytest.mark.parametrize("select", ["search", pytest.param("paper", marks=pytest.mark.soak)])
def test_auto_measures_plans_and_trains_what_every_plan_trains(tmp_path, select):
    network = support.model(dtype="float32")
    events = []
    made = setting(tmp_path, select=select)
    run = support.trained(made, SAMPLES, network, events)
    (tuned,) = [event for event in events if event["event"] == "tuned"]
    names = [event["event"] for event in events]
    assert names.index("device_joined") < names.index("tuned") < names.index("prepared")
    profile = Profile.from_dict(tuned["profile"])
    plan = Plan.from_dict(run.trace().meta["plan"])
    assert plan == tune(profile, made)
    assert str(plan) == tuned["plan"]
    assert tuned["epoch_s"] > 0
    check_profile(profile, network)

    # Group normalisation and plain SGD, averaged every step: all plans train the same weights.
    made = support.config(tmp_path / "fl", SAMPLES, method="fl", dtype="float32")
    plain = support.trained(made, SAMPLES, network)
    assert support.largest_difference(run.params, plain.params) < 1e-4


@pytest.mark.soak  # `tuner/test_learning` has the learning
def test_predicted_times_of_hosts_that_timed_reference_layers_are_learned_in_the_run(
    tmp_path, monkeypatch
):
    learned, learn = set(), Learner.learn

    def noted(self):
        learned.add(id(self))
        return learn(self)

    monkeypatch.setattr(Learner, "learn", noted)
    network = support.model(dtype="float32")
    events = []
    made = setting(tmp_path, times="predicted", adapt=True, look_s=0.05, gain=0.9)
    made.epochs, made.aggregation.every = 10, "epoch"
    run = support.trained(made, SAMPLES, network, events)
    (tuned,) = [event for event in events if event["event"] == "tuned"]
    profile = Profile.from_dict(tuned["profile"])
    assert Plan.from_dict(run.trace().meta["plan"]) == tune(profile, made)
    check_profile(profile, network)
    assert len(learned) >= 2  # each device, and the server if it computes


def check_profile(profile: Profile, network) -> None:
    assert [unit.name for unit in profile.units] == list(network.unit_names)
    assert tuple(one.samples for one in profile.devices) == SAMPLES
    assert profile.server.sizes == (2, 7)
    # What emulation adds is in the profile (by how much: test_unit_times); how long anything lasts
    # is no business of a test that a busy machine runs.
    quick, slow = (device.host for device in profile.devices)
    assert slow.handling == NO_HANDLING
    assert min(quick.update_s) > 0 and min(slow.update_s) > 0
    for device in profile.devices:
        for link in (device.up, device.down):
            assert 0 < link.rate_bytes_s < float("inf")
            assert 0.0019 < link.delay_s < 60  # half of the round trip, and never less


def test_surveys_know_the_numbers_of_micro_batches_that_plans_may_have(tmp_path):
    """What is not timed is taken from other sizes in proportion, which no call costs."""

    def found(method, **values):
        made = support.config(tmp_path, SAMPLES, method=method, dtype="float32")
        for path, value in values.items():
            group, name = path.split("_", 1)
            setattr(getattr(made, group), name, value)
        return made

    chain = {"nodes_count": 1, "pipeline_cuts": "1,2"}
    own = found("mpsl", pipeline_micro_batches=4, **chain)
    own.devices.overrides = {1: {"micro_batches": 2}}
    for made, numbers in (
        (found("auto", tuner_micro_batches="2,5"), {1, 2, 5}),
        (found("auto", tuner_micro_batches="2,5", tuner_select="paper"), set()),
        (found("mpsl", pipeline_micro_batches=4, **chain), {4}),
        (own, {2, 4}),
    ):
        resolved = resolve(made)
        assert numbers_of_plans(resolved, hosts_of(resolved)) == numbers


def test_no_room_for_any_plan_ends_the_run_with_one_error(tmp_path):
    made = setting(tmp_path)
    made.devices.defaults.memory_mb = 1e-6
    with pytest.raises(PlanError, match="no plan fits"):
        support.trained(made, SAMPLES, support.model(dtype="float32"))


def test_a_plan_may_mix_devices_that_train_alone_with_devices_that_are_cut(tmp_path, monkeypatch):
    """What the tuner may choose for unequal devices, the engine trains as well."""
    network = support.model(dtype="float32")
    mixed = Plan(
        (DeviceOption(0).device_plan(), DeviceOption(2, 3).device_plan()),
        dispatch="fixed",
        aggregate_every=1,
    )
    monkeypatch.setattr(first_plan, "choose_plan", lambda *_: (mixed, None))
    made = support.config(tmp_path / "mixed", SAMPLES, method="auto", dtype="float32")
    run = support.trained(made, SAMPLES, network)
    assert Plan.from_dict(run.trace().meta["plan"]) == mixed
    made = support.config(tmp_path / "fl", SAMPLES, method="fl", dtype="float32")
    plain = support.trained(made, SAMPLES, network)
    assert support.largest_difference(run.params, plain.params) < 1e-4
