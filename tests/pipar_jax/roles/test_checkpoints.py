"""A run that goes on from a checkpoint ends with the bits of one that was never interrupted."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from pipar_jax.config import CheckpointConfig, StopConfig, membership_script
from pipar_jax.config.checkpoints import CHECKPOINTS, FACTS, STATE, WEIGHTS, rounds_kept
from pipar_jax.disk.event_log import read_events
from pipar_jax.disk.files import write_tensors
from pipar_jax.errors import ConfigError, DiskError, Interrupted, RunError
from pipar_jax.launch import api
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.registry import METHODS
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.checkpoint_store import CheckpointStore, read_newest
from pipar_jax.roles.past import rows_until
from pipar_jax.roles.population import Population, Presence
from pipar_jax.roles.run_folder import RunFolder
from pipar_jax.roles.stop_rule import StopRule
from pipar_jax.training import checkpoint
from tests.pipar_jax.runtime import support
from tests.sources import ROOT

SAMPLES = (14, 14)
#: Methods whose middle is on a compute node.
CHAINS = ("mpsl", "accept")


def samples_of(method):
    return SAMPLES[:1] if method == "accept" else SAMPLES


def setting(folder, method, epochs=3, **checkpoint):
    made = support.config(folder, samples_of(method), method=method)
    made.epochs, made.optimizer.momentum, made.aggregation.every = epochs, 0.9, "epoch"
    if method in CHAINS:
        made.nodes.count = 2 if method == "accept" else 1
        made.pipeline.cuts, made.pipeline.micro_batches = "1,2", 2
    elif method != "fl":
        made.pipeline.cut = 1
    for name, value in checkpoint.items():
        setattr(made.checkpoint, name, value)
    return made


def resumed(made, epochs):
    made.epochs, made.run.resume = epochs, "auto"
    return made


def assert_equal(one, other):
    for ours, theirs in ((one.params, other.params), (one.state, other.state)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def rounds_of(run, event="round_finished"):
    return [row["round"] for row in run.metrics if row["event"] == event]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(double, method, tmp_path):
    whole = support.trained(setting(tmp_path / "whole", method), samples_of(method))
    made = setting(tmp_path / "parts", method, epochs=1, every_rounds=1)
    support.trained(made, samples_of(method))
    events = []
    parts = support.trained(resumed(made, 3), samples_of(method), None, events)
    assert_equal(parts, whole)
    assert rounds_of(parts) == [0, 1, 2]
    assert len(parts.trace().rounds) == 3
    script = [read_events(one.folder / membership_script.FILE, "round") for one in (parts, whole)]
    assert script[0] == script[1]  # which rounds each device took part in, and its steps
    assert [e["rounds"] for e in events if e["event"] == "run_resumed"] == [1]
    assert not [e for e in events if e["event"] == "state_lost"]
    times = [row["time_s"] for row in parts.metrics]
    assert times == sorted(times)


def test_a_run_of_an_earlier_version_is_read_and_goes_on(tmp_path):
    made = setting(tmp_path, "fl", epochs=1, every_rounds=1)
    first = support.trained(made, SAMPLES)
    path = first.folder / CHECKPOINTS / "1" / FACTS / "metadata"
    facts = json.loads(path.read_text(encoding="utf-8"))
    for later in ("private", "ends", "prepared", "stopped", "signature", "frozen", "base"):
        del facts[later]
    path.write_text(json.dumps(facts), encoding="utf-8")
    weights = first.folder / WEIGHTS
    header = checkpoint.facts(weights)
    del header["personal"], header["rounds"]
    write_tensors(weights, checkpoint.read_tensors(weights), {"pipar_jax": json.dumps(header)})
    assert_equal(load(first.folder, first.model), first)
    assert rounds_of(support.trained(resumed(made, 2), SAMPLES)) == [0, 1]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("method", ["sl", "pipar"])
def test_a_schedule_and_an_own_optimiser_go_on_after_a_resume(double, method, tmp_path):
    def make(folder, epochs, **checkpoint):
        made = setting(folder, method, epochs, **checkpoint)
        made.optimizer.name = "module:tests.pipar_jax.training.brought:rmsprop"
        made.optimizer.schedule, made.optimizer.drop_every = "step", 3
        made.optimizer.learning_rate, made.optimizer.warmup_steps = 0.001, 1
        return made

    whole = support.trained(make(tmp_path / "whole", 3), SAMPLES)
    made = make(tmp_path / "parts", 1, every_rounds=1)
    support.trained(made, SAMPLES)
    assert_equal(support.trained(resumed(made, 3), SAMPLES), whole)


def test_a_run_of_sampled_cohorts_goes_on_with_fresh_optimiser_states(double, tmp_path):
    made = setting(tmp_path, "pipar", epochs=2, every_rounds=1)
    made.cohort.size = 1
    first = support.trained(made, SAMPLES)
    events = []
    run = support.trained(resumed(made, 4), SAMPLES, None, events)
    assert rounds_of(run) == [0, 1, 2, 3]
    script = read_events(run.folder / membership_script.FILE, "round")
    assert len(first.metrics) < len(run.metrics) and len(script) == 4
    steps: dict[int, int] = {}
    for row in script:  # a device goes on in its own data where its last round ended
        (device,), ((_, begin, end),) = row["cohort"], row["spans"]
        assert begin == steps.get(device, 0)
        steps[device] = end
    assert not [e for e in events if e["event"] == "state_lost"]


def test_devices_that_a_checkpoint_knows_are_taken_up():
    before, after = Population(), Population()
    for index in range(2):
        before.join(Identity(f"d{index}", 14, 2), 0.0)
        before[index].rounds, before[index].step, before[index].fresh = 3, 6, False
        before[index].last = 4
    after.join(Identity("d1", 14, 2), 5.0)
    after.recall(before.records(), 5.0)
    assert (after[0].presence, after[0].fresh, after[0].step) == (Presence.LOST, True, 6)
    assert (after[1].presence, after[1].fresh, after[1].rounds) == (Presence.PRESENT, False, 3)
    assert [one.last for one in after] == [4, 4]
    rows = [{k: v for k, v in row.items() if k != "last"} for row in before.records()]
    older = Population()
    older.recall(rows, 5.0)  # of before it was noted
    assert [one.last for one in older] == [3, 3]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run of two rounds with checkpoints, optimiser states on the server."""
    with jax.enable_x64(True):
        made = setting(
            tmp_path_factory.mktemp("kept"), "pipar", epochs=2, every_rounds=1,
            device_state="server",
        )  # fmt: skip
        return support.trained(made, SAMPLES)


def again(kept, tmp_path):
    """A copy of it, and the configuration that goes on with it."""
    shutil.copytree(kept.folder, tmp_path / "run")
    made = setting(tmp_path, "pipar", device_state="server", every_rounds=1)
    made.run.resume = "auto"
    return made


def test_a_run_that_is_asked_to_end_has_a_checkpoint(double, tmp_path, monkeypatch):
    whole = support.trained(setting(tmp_path / "whole", "pipar"), SAMPLES)
    made = setting(tmp_path, "pipar", every_rounds=100)
    finish, serve = threading.Event(), api.run_server
    monkeypatch.setattr(api, "run_server", functools.partial(serve, finish=finish))

    def tell(event):
        if event["event"] == "round_finished":
            finish.set()

    with pytest.raises(Interrupted, match="checkpoint after 1 rounds"):
        api.run_here(api.resolve(made), data=support.datasets(SAMPLES), on_event=tell)
    monkeypatch.setattr(api, "run_server", serve)
    assert_equal(support.trained(resumed(made, 3), SAMPLES), whole)


# What Orbax was reading when it failed it does not close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_torn_checkpoint_gives_way_to_the_one_before(double, kept, tmp_path):
    made = again(kept, tmp_path)
    whole = support.trained(setting(tmp_path / "whole", "pipar"), SAMPLES)
    for path in (tmp_path / "run" / CHECKPOINTS / "2" / STATE).rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-9])
    events = []
    run = support.trained(made, SAMPLES, None, events)
    assert [e["rounds"] for e in events if e["event"] == "checkpoint_skipped"] == [2]
    assert [e["rounds"] for e in events if e["event"] == "run_resumed"] == [1]
    assert rounds_of(run) == [0, 1, 2]
    assert_equal(run, whole)
    assert rounds_kept(run.folder) == [1, 2, 3]  # the torn one has given way, too
    assert read_newest(run.folder, 2, lambda *_: None).rounds == 2


def test_a_run_that_goes_back_leaves_later_checkpoints_behind(double, kept, tmp_path):
    """Else it would write none before it is past them, and who resumes would get the old ones."""
    made = again(kept, tmp_path)
    made.run.resume = str(tmp_path / "run" / CHECKPOINTS / "1")
    made.checkpoint.device_state = "device"
    data = list(support.datasets(SAMPLES))
    with pytest.raises(ConfigError, match="fingerprint"):
        api.run_here(api.resolve(made), data=[data[1], *data[1:]], on_event=lambda event: None)
    assert rounds_kept(tmp_path / "run") == [1, 2]  # such a run has not begun
    events = []
    run = support.trained(made, SAMPLES, None, events)
    told = {kind: [e["rounds"] for e in events if e["event"] == kind]
            for kind in ("checkpoints_removed", "checkpoint", "checkpoint_failed")}  # fmt: skip
    assert told == {"checkpoints_removed": [[2]], "checkpoint": [2, 3], "checkpoint_failed": []}
    assert rounds_kept(run.folder) == [1, 2, 3]
    assert_equal(run, support.trained(setting(tmp_path / "whole", "pipar"), SAMPLES))
    assert rounds_of(support.trained(resumed(made, 4), SAMPLES)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 7), ("optimizer.learning_rate", 0.5), ("data.batch_size", 5)]
)
def test_another_configuration_is_refused_by_its_field(kept, tmp_path, field, value):
    made = again(kept, tmp_path)
    group, _, name = field.rpartition(".")
    setattr(getattr(made, group) if group else made, name, value)
    with pytest.raises(ConfigError, match=f"cannot be resumed with another {field} "):
        api.run_here(made, data=support.datasets(SAMPLES), on_event=lambda event: None)


def test_other_data_are_refused(double, kept, tmp_path):
    made = again(kept, tmp_path)
    data = list(support.datasets(SAMPLES))
    data[0], data[1] = data[1], data[0]
    with pytest.raises(ConfigError, match=r"samples of d[01] .* fingerprint"):
        api.run_here(api.resolve(made), data=data, on_event=lambda event: None)
    assert (tmp_path / "run" / WEIGHTS).is_file()  # nothing has begun


def test_a_finished_run_and_a_missing_one_are_refused(double, kept, tmp_path):
    made = again(kept, tmp_path)
    made.epochs = 2
    with pytest.raises(
        ConfigError,
        match=r"is finished, with epochs=2 \(2 rounds\), .* has epochs=2: raise epochs above 2",
    ):
        support.trained(made, SAMPLES)
    made.run.resume = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="there is no checkpoint of a run"):
        support.trained(made, SAMPLES)


def test_another_run_starts_from_the_weights_of_one(double, kept, tmp_path):
    made = setting(tmp_path, "fl", epochs=1)
    made.optimizer.learning_rate = 1e-12
    made.model.weights = str(kept.folder / CHECKPOINTS / "2")
    run = support.trained(made, SAMPLES)
    assert support.largest_difference(run.params, kept.params) < 1e-9
    made.model.weights, made.model.weights_match = str(kept.folder), "nothing*"
    with pytest.raises(ConfigError, match="matches no weight"):
        support.trained(made, SAMPLES)


def test_weights_are_exported_for_flax(kept, tmp_path):
    target = tmp_path / "weights.msgpack"
    command = [sys.executable, "-m", "experiments.export", str(kept.folder), f"--output={target}"]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    tree = serialization.msgpack_restore(target.read_bytes())
    for unit, arrays in kept.params.items():
        for path, array in arrays.items():
            found = tree[unit]
            for name in path.split("/"):
                found = found[name]
            np.testing.assert_array_equal(found, array)


def test_a_store_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2, best="accuracy"))
    for rounds, score in ((1, 0.9), (2, 0.5), (3, 0.6), (4, 0.7)):
        arrays = {"-2/params/a/w": np.full(3, rounds), "-2/params/a/none": np.zeros((0, 2))}
        store.save(rounds, arrays, {"config": {}, "n": rounds}, score)
    store.close()
    assert rounds_kept(tmp_path) == [1, 3, 4]
    found = read_newest(tmp_path, 3, lambda rounds, reason: None)
    assert (found.rounds, found.facts["n"]) == (3, 3)
    np.testing.assert_array_equal(found.tensors["-2/params/a/w"], np.full(3, 3))
    assert found.tensors["-2/params/a/none"].shape == (0, 2)
    with pytest.raises(DiskError, match=r"cannot hold checkpoint\.keep=2"):
        store.check_space(1 << 60)


def test_a_checkpoint_that_orbax_does_not_write_is_an_error(tmp_path):
    arrays = {"-2/params/a/w": np.zeros(3)}
    store = CheckpointStore(tmp_path, CheckpointConfig())
    store.save(5, arrays, {"config": {}}, None)
    store.wait()
    with pytest.raises(DiskError, match="there is one of a later round than 4 already"):
        store.save(4, arrays, {"config": {}}, None)
    store.close()
    store = CheckpointStore(tmp_path, CheckpointConfig())
    assert store.leave_behind(3) == [5] and store.leave_behind(3) == []
    store.save(4, arrays, {"config": {}}, None)
    store.close()
    assert rounds_kept(tmp_path) == [4]


def test_what_a_checkpoint_that_does_not_fit_has_written_is_removed(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, CheckpointConfig())
    tensors = {"0/params/a/w": np.zeros(3, np.float32)}
    store.save(1, tensors, {}, None)
    store.wait()
    folder = tmp_path / CHECKPOINTS

    def full(*_args, **_named):
        (folder / "2.orbax-checkpoint-tmp" / "part").mkdir(parents=True)
        raise ValueError(f"RESOURCE_EXHAUSTED: {'x' * 400}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(DiskError, match=r"cannot be written: no space is left on the disk$"):
            store.save(2, tensors, {}, None)
    store.close()
    assert [one.name for one in folder.iterdir()] == ["1"]
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    CheckpointStore(tmp_path, CheckpointConfig()).check_space(1)
    assert [one.name for one in folder.iterdir()] == ["1"]


@pytest.mark.parametrize("again", [False, True], ids=["a new run", "a resumed one"])
def test_a_disk_that_is_full_in_training_costs_the_run_its_events_alone(
    double, tmp_path, monkeypatch, again
):
    made = setting(tmp_path, "fl", epochs=2, every_rounds=1)
    if again:
        made.epochs = 1
        support.trained(made, SAMPLES)
        made = resumed(made, 2)
    add, events = RunFolder.add_event, []

    def refuse(self, event):
        if event["event"] == "round_finished":
            raise DiskError("no space left")
        add(self, event)

    monkeypatch.setattr(RunFolder, "add_event", refuse)
    with pytest.raises(DiskError, match=r"the run is over and .* is saved, but . rows of metrics"):
        support.trained(made, SAMPLES, None, events)
    assert [e["event"] for e in events if e["event"] in ("not_kept", "run_finished")] == [
        "not_kept", "run_finished"
    ]  # fmt: skip


def test_events_after_the_checkpoint_are_left_out():
    rows = [
        {"event": "run_started"}, {"event": "round_finished", "round": 0},
        {"event": "checkpoint", "rounds": 1}, {"event": "round_finished", "round": 1},
        {"event": "evaluated", "round": 1}, {"event": "run_finished"},
    ]  # fmt: skip
    assert rows_until(rows, 1) == tuple(rows[:3])
    assert rows_until(rows, 2) == tuple(rows[:5])


@pytest.mark.parametrize(
    ("config", "metric", "scores", "expected"),
    [
        (StopConfig(patience=2), "accuracy", (0.5, 0.4, 0.5, 0.3), 2),
        (StopConfig(target=0.6), "accuracy", (0.5, 0.61), 1),
        (StopConfig(target=0.2), "loss", (0.5, 0.3, 0.2), 2),
        (StopConfig(target=1.5), "rmse", (2.0, 1.6, 1.4), 2),
        (StopConfig(patience=2), "rmse", (None, float("nan"), 1.6, 1.7, 1.6), 4),
        (StopConfig(when="json:dumps"), "accuracy", (0.5,), "returned"),
    ],
    ids=["patience", "target", "loss", "lower is better", "not finite", "function"],
)
def test_a_run_stops_early(config, metric, scores, expected):
    rule = StopRule(config, metric, higher_is_better=metric == "accuracy")
    for index, score in enumerate(scores):
        metrics = {} if metric == "loss" else {metric: score}
        event = {"event": "evaluated", "round": index, "metrics": metrics, "loss": score}
        if expected == "returned":
            with pytest.raises(RunError, match=r"stop.when returned"):
                rule.add(event)
            return
        rule.add(event)
        assert (rule.reason is not None) == (index >= expected)


def test_a_checkpoint_that_fails_in_the_background_costs_no_other(double, tmp_path, monkeypatch):
    wait, waited = CheckpointStore.wait, []

    def failing(self):
        waited.append(self)
        if len(waited) == 2:  # before the second is begun
            raise DiskError("no room")
        wait(self)

    monkeypatch.setattr(CheckpointStore, "wait", failing)
    events = []
    run = support.trained(setting(tmp_path, "pipar", every_rounds=1), SAMPLES, None, events)
    assert [e["rounds"] for e in events if e["event"] == "checkpoint_failed"] == [1]
    assert [e["rounds"] for e in events if e["event"] == "checkpoint"] == [1, 2, 3]
    assert rounds_kept(run.folder)[-1] == 3


@pytest.mark.sampled(3)
@pytest.mark.parametrize("frozen", ["none", "some"])
@pytest.mark.parametrize("of", ["the run", "a checkpoint"])
def test_a_run_starts_from_the_weights_of_a_run(double, tmp_path, of, frozen):
    """Also where some are frozen: they are in the weights of a run that is over as well."""
    made = setting(tmp_path, "pipar", epochs=1, every_rounds=1)
    if frozen == "some":
        made.model.trainable = "fc2/"
    before = support.trained(made, SAMPLES)
    path = before.folder / (WEIGHTS if of == "the run" else f"{CHECKPOINTS}/1")
    later = setting(tmp_path / "later", "pipar", epochs=1)
    later.model.trainable, later.model.weights = made.model.trainable, str(path)
    later.optimizer.learning_rate = 1e-300
    assert_equal(support.trained(later, SAMPLES), before)
    if frozen == "some" and of == "the run":
        later.seed = 7  # its frozen weights are others
        with pytest.raises(ConfigError, match=r"model\.weights=.* is frozen, and not what this"):
            support.trained(later, SAMPLES)
