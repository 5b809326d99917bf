"""A plan that changes during a run trains the weights that it would have trained anyhow."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import stages
from pipar_jax.config import TunerConfig
from pipar_jax.errors import ConfigError, PlanError, RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import EVERY, Seen
from pipar_jax.roles import adaptation, first_plan
from pipar_jax.roles.survey import Surveyed
from pipar_jax.runtime import migration, moves
from pipar_jax.runtime.observations import Observer
from pipar_jax.runtime.unit_state import UnitState, fitted
from pipar_jax.schedule.actions import AGGREGATE, FORWARD, Action
from pipar_jax.schedule.feasibility import check_adaptable
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import COORDINATOR, Plan
from pipar_jax.schedule.trace import Timed
from pipar_jax.training import optimizer
from pipar_jax.tuner.bounds import DeviceOption
from tests.pipar_jax.runtime import support
from tests.pipar_jax.tuner import profiles

RTOL = 1e-9
#: Full mini-batches of 7 on both devices: momentum equals that of the union.
EVEN, RAGGED = (35, 35), (13, 34)
FL, SHORT, LONG = DeviceOption(0), DeviceOption(1, 3), DeviceOption(2, 4)


def plan_of(options, every: int = 1) -> Plan:
    return Plan(tuple(option.device_plan() for option in options), aggregate_every=every)


@pytest.fixture(scope="module")
def network():
    import jax

    jax.config.update("jax_enable_x64", True)
    yield support.model()
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def scripted(monkeypatch):
    """Lets a run change its plan when a test wants it: a function from {round: plan}."""

    def install(script: dict[int, Plan]) -> None:
        class Scripted(adaptation.Adaptation):
            def begin(self):
                """Looks at nothing."""

            def ready(self):
                wanted = self._choice.wanted = script.get(self._index + 1)
                if wanted is not None:  # no host takes up a plan that it was not told of
                    self._host.prepare_ahead(self._index, wanted)
                    self._tell(messages.CompileAhead(self._index, wanted))
                    self._numbers[wanted] = self._index
                    while self._compiled.get(self._index) != {COORDINATOR, *self._links}:
                        self._members.poll()
                        time.sleep(0.01)
                return wanted

        monkeypatch.setattr(first_plan, "Adaptation", Scripted)

    return install


def setting(folder, samples, method="pipar", **values):
    made = support.config(folder, samples, method=method, **values)
    made.pipeline.cut, made.pipeline.micro_batches = 1, 3
    made.optimizer.momentum = 0.9
    made.tuner.adapt, made.tuner.sizes, made.tuner.methods = True, "2,7", "fl,sfl,pipar"
    made.tuner.codecs = "raw"  # all plans train the same
    return made


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(
    ("method", "script"),
    [
        ("pipar", {1: [LONG, LONG], 3: [SHORT, SHORT]}),
        ("pipar", {2: [FL, FL], 4: [LONG, LONG]}),
        ("fl", {1: [SHORT, SHORT], 2: [LONG, FL], 3: [FL, SHORT]}),
    ],
    ids=["cuts", "cut-fl-cut", "fl-mixed"],
)
def test_changed_plans_train_what_one_plan_trains(
    double, network, scripted, method, script, tmp_path
):
    plans = {index: plan_of(options) for index, options in script.items()}
    scripted(plans)
    events = []
    made = setting(tmp_path / "changed", EVEN, method)
    run = support.trained(made, EVEN, network, events)
    changes = {e["round"]: Plan.from_dict(e["to"]) for e in events if e["event"] == "replanned"}
    assert changes == plans
    made.tuner, made.run.dir = TunerConfig(), str(tmp_path / "kept")
    kept = support.trained(made, EVEN, network)
    assert support.largest_difference(run.params, kept.params) < RTOL
    loaders = support.batches(made, EVEN)
    union = [[loader.batch(step) for loader in loaders] for step in range(5)]
    expected = support.centralised(made, network, union)
    assert support.largest_difference(run.params, expected) < RTOL


def test_momentum_that_belongs_to_a_device_moves_with_its_units(
    double, network, scripted, tmp_path
):
    """Averaged every other step over unequal shards, devices' momenta differ: none may be lost."""
    scripted({1: plan_of([LONG, FL], 2), 2: plan_of([SHORT, LONG], 2)})
    made = setting(tmp_path / "changed", RAGGED)
    made.aggregation.every, made.aggregation.proximal_mu = "2 steps", 0.1
    run = support.trained(made, RAGGED, network)
    made.tuner, made.run.dir = TunerConfig(), str(tmp_path / "kept")
    kept = support.trained(made, RAGGED, network)
    assert support.largest_difference(run.params, kept.params) < RTOL


def test_moves_go_both_ways():
    old, new = plan_of([DeviceOption(1, 2), FL, LONG]), plan_of([DeviceOption(3, 2), SHORT, LONG])
    assert moves.moves(old, new, 4) == [
        moves.Move(0, 1, "server", "d0"),
        moves.Move(0, 2, "server", "d0"),
        moves.Move(1, 1, "d1", "server"),
        moves.Move(1, 2, "d1", "server"),
        moves.Move(1, 3, "d1", "server"),
    ]


@pytest.mark.soak  # `test_adapting_chains` has such a run
def test_a_run_behind_a_slow_link_changes_its_plan_by_itself(double, network, tmp_path):
    """Federated averaging once an epoch does not wait for a link's delay in each step."""
    made = setting(tmp_path / "changed", EVEN)
    made.aggregation.every, made.epochs = "epoch", 24
    made.devices.defaults.link = "20/20/150ms"
    made.tuner.look_s, made.tuner.methods, made.tuner.gain = 0.05, "fl,pipar", 0.1
    events = []
    run = support.trained(made, EVEN, network, events)
    changes = [event for event in events if event["event"] == "replanned"]
    assert changes, "no plan was found better than one that waits for a slow link"
    # Where the machine is busy with other work, another plan may follow.
    assert any(not any(one["cuts"] for one in e["to"]["devices"]) for e in changes)
    assert changes[0]["to_epoch_s"] < 0.9 * changes[0]["from_epoch_s"]
    (finished,) = [event for event in events if event["event"] == "run_finished"]
    rounds = sum(event["seconds"] for event in events if event["event"] == "round_finished")
    moved = sum(event["seconds"] for event in changes)
    assert finished["seconds"] == pytest.approx(rounds + moved)
    made.tuner, made.run.dir = TunerConfig(), str(tmp_path / "kept")
    made.devices.defaults.link = "none"
    kept = support.trained(made, EVEN, network)
    assert support.largest_difference(run.params, kept.params) < RTOL


@pytest.mark.parametrize(("method", "methods"), [("sl", "fl"), ("auto", "sl")])
def test_turns_cannot_change_their_plan(tmp_path, method, methods):
    made = setting(tmp_path, EVEN, method)
    made.tuner.methods = methods
    with pytest.raises(ConfigError, match=r"tuner.adapt=true cannot be combined with method="):
        support.trained(made, EVEN)
    with pytest.raises(PlanError, match="devices in parallel"):
        check_adaptable(dataclasses.replace(plan_of([SHORT]), order="sequential"))


def test_nodes_that_a_method_has_no_use_for_do_not_adapt(tmp_path):
    made = setting(tmp_path, EVEN)
    made.nodes.count = 1
    with pytest.raises(ConfigError, match=r"cannot be combined with nodes.count=1"):
        support.trained(made, EVEN)


def test_what_computations_lasted_is_told_once():
    observer = Observer()
    one = Action(0, FORWARD, 1, 7)
    for end_s in (1.0, 5.0, 2.0):
        observer.add(Timed(one, 0.0, end_s, 0, 3))
    observer.add(Timed(one._replace(kind=AGGREGATE), 0.0, 9.0))
    assert observer.take() == [Seen(1, 0, FORWARD, 3, 3, 2.0)]
    assert observer.take() == []


def test_an_optimiser_state_that_does_not_fit_is_refused():
    given, like = {"00000": np.zeros(2, np.float32)}, {"m": np.zeros(1, np.float32)}
    with pytest.raises(RunError, match=r"^d0: unit 'a' came with .*float32\[2\].*expected"):
        fitted(given, like, "d0: unit 'a'")


def test_nothing_is_left_of_a_run_that_fails_while_it_adapts(
    double, network, monkeypatch, tmp_path
):
    def broken(self, look):
        raise ValueError("no such luck")

    monkeypatch.setattr(adaptation.Adaptation, "_consider", broken)
    made = setting(tmp_path, EVEN)
    made.epochs, made.tuner.look_s = 4000, 0.001  # as long as it takes that thread to have a turn
    with pytest.raises(RunError, match="adapting failed: no such luck"):
        support.trained(made, EVEN, network)
    assert not [one for one in threading.enumerate() if one.name == "pipar-adapt"]


def test_nothing_is_decided_between_ready_and_changed():
    """A look that ends while hosts change their plan must not take the wanted one away."""
    profile = profiles.profile(profiles.device(units=4), units=4)
    now, wanted = (
        Plan((DeviceOption(1, 4).device_plan(),)),
        Plan((DeviceOption(2, 4).device_plan(),)),
    )
    made = adaptation.Adaptation(
        profiles.config(), support.model(dtype="float32"), Surveyed(profile, {}), now, 9,
        SimpleNamespace(by_name={}, listeners={}), SimpleNamespace(observer=Observer()),
    )  # fmt: skip
    made._choice.wanted, made._numbers[wanted] = wanted, 0
    assert made.ready() is None  # nobody has compiled it
    made._compiled[0] = {COORDINATOR}
    look = made._ask()
    assert made.ready() == wanted
    made._consider(look.number)
    assert made._choice.wanted == wanted
    assert made._ask() is None
    made.changed(3)
    assert (made._choice.plan, made._choice.wanted) == (wanted, None)
    assert made._ask().plan == wanted


def test_a_unit_with_nothing_to_learn_needs_nothing_to_move(network, tmp_path):
    from flax import nnx

    units = [
        ("flatten", lambda rngs: nnx.Sequential(lambda x: x.reshape(x.shape[0], -1))),
        ("dense", lambda rngs: nnx.Linear(4, 3, rngs=rngs)),
    ]
    model = stages.Model.from_units("own", units, (2, 2), 3)
    made = setting(tmp_path, EVEN)
    compiled = optimizer.compiled(made.optimizer, steps=1, proximal_mu=0.0)

    def nothing(copy):
        return Keep.NOTHING

    arrived = {(EVERY, "flatten"): UnitState({}, {}), (0, "flatten"): UnitState(opt={})}
    found = migration.assemble(model, plan_of([SHORT]), "d0", {}, arrived, compiled, nothing)
    assert found[0, 0].stage.unit_names == ("flatten",) and found[0, 0].params == {"flatten": {}}
    with pytest.raises(RunError, match="units \\['dense'\\] that did not arrive"):
        migration.assemble(model, plan_of([SHORT]), "server", {}, arrived, compiled, nothing)
