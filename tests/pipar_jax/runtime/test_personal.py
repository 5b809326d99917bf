"""Personal weights (``aggregation.personal``): each device's own, never averaged, never sent."""

from __future__ import annotations

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import HOST_STATES, PERSONAL
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch.api import train
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.personal_checks import averaging_methods
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.predictor.predict_host import facts_of
from pipar_jax.roles.evaluation import Evaluator
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.start_weights import start_weights
from pipar_jax.roles.whole_weights import whole_weights
from pipar_jax.runtime import exchanges
from pipar_jax.runtime.personal import PersonalWeights, run_of
from pipar_jax.runtime.setup import as_trained
from pipar_jax.simulator.predict import StageCosts
from pipar_jax.training import checkpoint
from pipar_jax.training.checkpoint import read_tensors
from stages import StageError
from stages.personal import personal_paths, shared
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles import open_runs
from tests.pipar_jax.runtime import support
from tests.pipar_jax.tuner import profiles

SAMPLES, TESTS, BATCH = (14, 20), (5, 11), 7
#: Personal weights by method: of a unit that it leaves on the devices.
PATTERNS = {"fl": "out/linear", "sfl": "fc2/linear/kernel", "pipar": "fc1/", "mpsl": "out/"}


def setting(tmp_path, method: str) -> Config:
    made = support.config(tmp_path, SAMPLES, name="chain", batch=BATCH, method=method)
    made.optimizer.momentum, made.aggregation.every, made.epochs = 0.9, "2 steps", 2
    made.aggregation.personal = PATTERNS[method]
    made.run.evaluate_on, made.run.evaluate_every = "devices", 1
    made.pipeline.cut, made.pipeline.micro_batches = 2, 2
    if METHODS[method].uses_nodes:
        made.nodes.count, made.pipeline.cuts = 1, "2,5"
    return made


def data() -> list:
    own = [support.dataset(n, i, test=TESTS[i]) for i, n in enumerate(SAMPLES)]
    return [*own, support.dataset(0, 99, test=16)]


def reference(made: Config, network) -> list:
    """Trains each device's network alone and averages the weights that match nothing."""
    rate, momentum = made.optimizer.learning_rate, made.optimizer.momentum
    tx = optax.sgd(rate, momentum)
    params, state = network.init(made.seed)
    personal = personal_paths(as_trained(made, network))

    @jax.jit
    def step(params, opt_state, x, labels):
        def loss(params):
            logits = stages.predict(network, params, state, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    loaders = support.batches(made, SAMPLES)
    steps = made.epochs * max(one.steps_per_epoch for one in loaders)
    own = [(params, tx.init(params)) for _ in SAMPLES]
    for first in range(0, steps, 2):
        trained = [0, 0]
        for device, loader in enumerate(loaders):
            for index in range(first, first + 2):
                batch = loader.batch(index)
                trained[device] += len(batch.x)
                x = jnp.asarray(batch.x, jnp.float64)
                own[device] = step(*own[device], x, jnp.asarray(batch.targets["y"]))
        mean = jax.tree.map(
            lambda *some, by=trained: sum(a * w for a, w in zip(some, by, strict=True)) / sum(by),
            *[one for one, _ in own],
        )
        own = [
            (
                {
                    unit: {
                        path: one[unit][path] if path in personal.get(unit, ()) else array
                        for path, array in arrays.items()
                    }
                    for unit, arrays in mean.items()
                },
                opt_state,
            )
            for one, opt_state in own
        ]
    return [one for one, _ in own]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", averaging_methods())
def test_networks_are_those_of_federated_personalisation(double, tmp_path, method):
    network, events = support.chain(), []
    made = setting(tmp_path, method)
    run = train(made, network, data(), on_event=events.append)
    wanted = reference(made, network)
    chosen = as_trained(made, network)
    names = {f"{u}/{p}" for u, paths in personal_paths(chosen).items() for p in paths}
    assert set(run.personal) == names != set()
    assert support.largest_difference(run.params, shared(chosen, wanted[0])) < 1e-12
    of_each = [load(run.folder, network, device=device) for device in range(len(SAMPLES))]
    for one, expected in zip(of_each, wanted, strict=True):
        assert support.largest_difference(one.params, expected) < 1e-12
    unit, path = min(names).split("/", 1)
    assert np.any(of_each[0].params[unit][path] != of_each[1].params[unit][path])
    # Each device has scored its own network.
    last = [one for one in events if one["event"] == "evaluated"][-1]
    for device, (one, tests) in enumerate(zip(of_each, data(), strict=False)):
        score = Evaluator(one.model, tests, "float64").evaluate(one.params, one.state)
        assert last["devices"][str(device)]["loss"] == pytest.approx(score.loss, rel=1e-9)
    # And neither the server nor whoever loads the run can predict without them.
    with pytest.raises(RunError, match=r"shared weights alone, and .* are each device's own"):
        run.predict(data()[-1].test.x)
    assert of_each[0].predict(data()[-1].test.x).shape == (16,)
    with pytest.raises(RunError, match=r"hosts/d7/personal.safetensors is not there: device 7 has"):
        load(run.folder, network, device=7)


@pytest.mark.parametrize("method", averaging_methods())
def test_averages_have_fewer_bytes_by_those_of_the_personal_weights(double, tmp_path, method):
    made = setting(tmp_path, method)
    made.epochs, networks = 1, []
    for pattern in ("", made.aggregation.personal):
        made.aggregation.personal = pattern
        networks.append(as_trained(made, support.chain()))
    personal = sum(unit.personal_bytes for unit in networks[1].units)
    assert personal > 0
    plan, names = plan_for(made, networks[0].unit_names), networks[0].unit_names
    for occasion in (
        exchanges.trained,
        exchanges.averaged,
        functools.partial(exchanges.whole, optimizers=False),
    ):
        wanted = occasion(plan, "d0", names)
        plain, fewer = (Holdings(one, made).nbytes(wanted) for one in networks)
        assert plain - fewer == personal


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("size", [0, 1])
def test_a_resumed_run_goes_on_with_them(double, tmp_path, size):
    """Also where a round's cohort is sampled, whose optimisers begin fresh."""
    runs = []
    for folder, parts in (("whole", (2,)), ("parts", (1, 2))):
        made = setting(tmp_path / folder, "fl")
        made.aggregation.every, made.cohort.size = "epoch", size
        made.optimizer.momentum = 0.0 if size else 0.9
        made.checkpoint.every_rounds = 1
        events = []
        for epochs in parts:
            made.epochs = epochs
            made.run.resume = "auto" if epochs != parts[0] else ""
            run = train(made, support.chain(), data(), on_event=events.append)
        assert not [one for one in events if one["event"] == "state_lost"]
        runs.append([load(run.folder, support.chain(), device=i).params for i in (0, 1)])
    for whole, resumed in zip(*runs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_device_that_is_left_out_of_a_round_goes_back_to_those_before_it(tmp_path, monkeypatch):
    """A replay ends with the same ones: nothing of what was given up is left in them."""
    dropped = threading.Event()
    open_runs.before_batch(monkeypatch, 1, 3, lambda: dropped.wait(PATIENCE_S))
    made = open_runs.config(tmp_path, "fl", rounds=8, quorum=2, deadline_s=8.0)

    def go_on(run, event):
        if event["event"] == "device_dropped":
            dropped.set()

    made.run.evaluate_on, made.aggregation.personal = "devices", "fc4"
    runs = []
    for name in ("run", "replay"):
        made.name = name
        made.cohort.script = str(runs[0].folder / "membership.jsonl") if runs else ""
        when = open_runs.together(go_on, open_runs.pause_until_there(seconds=0.4))
        run = open_runs.OpenRun(made, when=None if runs else when)
        run.network = as_trained(run.config, run.network)
        run.data = [support.dataset(n, i, test=7) for i, n in enumerate(open_runs.SAMPLES)]
        run.data.append(support.dataset(0, 99, test=7))
        runs.append(run.run(range(3)))
        assert run.error is None
    assert any(out["place"] == 1 for row in runs[0].script() for out in row["out"])
    assert runs[0].script()[-1]["commit"] == [0, 1, 2]  # it has gone on from them
    for device in range(3):
        own = [load(run.folder, run.network, device=device).params for run in runs]
        jax.tree.map(np.testing.assert_array_equal, *own)


def changed(made: Config, values: dict) -> Config:
    for path, value in values.items():
        section, field = path.split(".") if "." in path else (None, path)
        setattr(made if section is None else getattr(made, section), field, value)
    return made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "sl"}, r"personal='out' keeps weights out of the average, and method=sl "),
        ({"method": "accept", "nodes.count": 2, "devices.count": 1}, "averages none"),
        ({"method": "auto"}, "cannot be combined with method=auto.*: choose a method"),
        ({"method": "mpsl", "nodes.count": 1}, "whose plans may .*: set pipeline.cuts"),
        ({"method": "pipar", "tuner.adapt": True}, "with tuner.adapt=true.*set tuner.adapt=false"),
        ({"run.evaluate_on": "both"}, "which the server cannot score: set run.evaluate_on=devices"),
        ({"checkpoint.every_rounds": 1, "checkpoint.device_state": "server"}, "device_state=devi"),
        ({"aggregation.personal": "(out"}, r"personal='\(out' is not a regular expression"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, values, message):
    made = setting(tmp_path, "fl")
    made.aggregation.personal = "out"
    with pytest.raises(ConfigError, match=message):
        resolve(changed(made, values), models=("chain",), reads_data=False)


def test_a_private_run_has_none(tmp_path):
    made = changed(setting(tmp_path, "fl"), {"privacy.epsilon": 8.0, "privacy.update_clip": 1.0})
    made.run.evaluate_on, made.privacy.delta = "server", 1e-3
    with pytest.raises(ConfigError, match="cannot be combined with privacy"):
        resolve(made, models=("chain",), reads_data=False)


@pytest.mark.parametrize(
    ("method", "pattern", "error", "message"),
    [
        ("fl", "nothing", StageError, "no trained weight matches 'nothing'; its trained .*fc1/"),
        ("fl", ".", StageError, "all trained weights match, so that nothing would be averaged"),
        ("pipar", "out/", ConfigError, "matches out/linear/bias, but .* is on the server, not on"),
        ("mpsl", "fc3", ConfigError, "the unit 'fc3' of device 0 is on compute node 1, not on"),
    ],
)
def test_patterns_of_no_use_are_refused_before_anything_starts(
    double, tmp_path, method, pattern, error, message
):
    made = setting(tmp_path, method)
    made.aggregation.personal = pattern
    with pytest.raises(error, match=message):
        train(made, support.chain(), data())
    assert not list(tmp_path.iterdir())


def test_a_prediction_averages_fewer_bytes_by_theirs(double, tmp_path):
    made, sent = setting(tmp_path, "fl"), []
    for pattern in ("", made.aggregation.personal):
        made.aggregation.personal = pattern
        model = as_trained(made, support.chain())
        facts = facts_of(model, optax.sgd(0.1), 4)
        assumed = profiles.profile(profiles.device(units=len(facts)), units=len(facts))
        costs = StageCosts(dataclasses.replace(assumed, units=facts))
        sent.append(costs.weight_bytes(0, len(facts)))
    assert sent[0] - sent[1] == sum(unit.personal_bytes for unit in model.units) > 0


def test_a_run_starts_from_weights_that_lack_them(double, tmp_path):
    model = as_trained(setting(tmp_path, "fl"), support.chain())
    params, state = model.init(1)
    path = tmp_path / "shared.safetensors"
    checkpoint.save(path, shared(model, params), state, {"personal": ["out/linear/bias"]})
    drawn, _ = model.init(0)
    begun, _ = start_weights(path, "", model, drawn, state)
    assert whole_weights(path).personal == ("out/linear/bias",)
    for unit, arrays in begun.items():
        for name, array in arrays.items():
            own = name in personal_paths(model).get(unit, ())
            np.testing.assert_array_equal(array, (drawn if own else params)[unit][name])


def test_a_file_of_another_run_is_kept_and_its_weights_are_refused(double, tmp_path):
    """Devices that are started by hand may use a folder again."""
    runs = [train(setting(tmp_path, "fl"), support.chain(), data()) for _ in range(2)]
    files = [run.folder / HOST_STATES / "d0" / PERSONAL for run in runs]
    kept = files[0].read_bytes()
    later = PersonalWeights(as_trained(setting(tmp_path, "fl"), support.chain()), 0)
    trained = {f"personal/{name}": array for name, array in read_tensors(files[1]).items()}
    later.recall(trained, 1)
    later.run = run_of(files[1])
    later.save(files[0].parent, "d0")
    assert read_tensors(files[0]).keys() == read_tensors(files[1]).keys()
    (aside,) = set(files[0].parent.glob("personal*")) - {files[0]}
    assert aside.read_bytes() == kept
    with pytest.raises(RunError, match="is of another run, whose devices used the same folder"):
        load(runs[0].folder, support.chain(), device=0)
    aside.replace(files[0])
    load(runs[0].folder, support.chain(), device=0)


def test_a_process_that_outlives_its_run_begins_the_next_with_the_first_weights(double, tmp_path):
    made = as_trained(setting(tmp_path, "fl"), support.chain())
    drawn = PersonalWeights(made, 0).tensors()
    weights = PersonalWeights(made, 0)
    weights.belong_to("a" * 32)
    trained = {name: array + 1 for name, array in drawn.items()}
    weights.recall(trained, 3)
    weights.belong_to("a" * 32)  # resumed
    assert weights.rounds == 3
    for name, array in weights.tensors().items():
        np.testing.assert_array_equal(array, trained[name])
    weights.belong_to("b" * 32)
    assert (weights.run, weights.rounds) == ("b" * 32, 0)
    for name, array in weights.tensors().items():
        np.testing.assert_array_equal(array, drawn[name])
