"""What hosts alone have, where they were busy or away at a checkpoint, or are started again."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pipar_jax.config.checkpoints import HOST_STATES, PERSONAL
from pipar_jax.launch.finished_run import load
from pipar_jax.roles import server
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.setup import as_trained
from pipar_jax.runtime.state_files import StateFiles, StateTag
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles.open_runs import OpenRun, Points, config, equal, lose, told
from tests.pipar_jax.runtime import support


@pytest.fixture
def points(monkeypatch):
    return Points(monkeypatch)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("state", ["server", "device"])
@pytest.mark.parametrize("method", ["fl", "pipar"])
def test_a_device_that_is_at_work_at_a_checkpoint_goes_on_after_it(tmp_path, points, method, state):
    """Its optimiser state is in no checkpoint: it begins with a fresh one, and that is told."""
    made = config(tmp_path, method, rounds=1, first=2)
    made.checkpoint.every_rounds, made.checkpoint.device_state = 1, state
    run = OpenRun(made)
    points.once("batch", "d1", 0, lambda: told(run, "checkpoint", 1))
    run.run(range(3))
    assert run.error is None and not points.hooks
    made.epochs, made.run.resume, made.cohort.first, made.cohort.quorum = 3, "auto", 0, 2
    again = OpenRun(made).run(range(3))
    assert again.error is None and not again.errors, (again.error, again.errors)
    lost = {event["host"]: event for event in again.kinds("state_lost")}
    assert lost.keys() == {"d1"}
    assert lost["d1"]["optimizer"] and not lost["d1"]["personal"] and lost["d1"]["reason"]
    assert [row["commit"] for row in again.script()[1:]] == [[0, 1, 2]] * 2


def personal(folder, rounds, **cohort):
    """A run that goes on once all are there; each device keeps the last layer for itself."""
    values = {"quorum": 3, "below": "repeat", "wait_s": PATIENCE_S} | cohort
    made = config(folder, "fl", rounds=rounds, **values)
    made.optimizer.momentum, made.checkpoint.every_rounds = 0.0, 1
    made.run.evaluate_on, made.aggregation.personal = "devices", "fc4"
    return made


def opened(made, when=None):
    run = OpenRun(made, when=when)
    run.network = as_trained(run.config, run.network)
    run.data = [support.dataset(n, i, test=7) for i, n in enumerate((*run.samples, 0))]
    return run


def assert_same_networks(run, other):
    """All have the same weights, and each device those of its own."""
    assert equal(run.weights(), other.weights())
    for device in range(3):
        own = [load(one.folder, one.network, device=device).params for one in (run, other)]
        jax.tree.map(np.testing.assert_array_equal, *own)


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("left", ["its last file", "that of a checkpoint", "nothing"])
def test_a_device_that_is_started_again_goes_on_with_its_personal_weights(tmp_path, points, left):
    undisturbed = opened(personal(tmp_path / "whole", 4)).run(range(3))

    def start_again(run, event):
        if event["event"] != "device_lost":
            return
        run.await_end(1)
        folder = run.folder / HOST_STATES / "d1"
        states = sorted(folder.glob("*-*.safetensors"))
        assert states and (folder / PERSONAL).exists()
        if left != "its last file":
            (folder / PERSONAL).unlink()
        for path in states if left != "that of a checkpoint" else ():
            path.unlink()
        run.start(1)

    run = opened(personal(tmp_path / "again", 4), start_again)
    points.once("batch", "d1", 5, lambda: lose(run, 1))  # in the third round
    run.run(range(3))
    assert run.error is None and not points.hooks
    lost = run.kinds("state_lost")
    if left == "nothing":
        (event,) = lost
        assert (event["host"], event["optimizer"], event["personal"]) == ("d1", False, True)
        assert "those of the start, and it has trained in round 2" in event["reason"]
    else:
        assert not lost
        assert_same_networks(run, undisturbed)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("at", ["device_joined", "run_started"])
def test_a_device_that_comes_after_its_run_was_resumed_has_its_personal_weights(
    tmp_path, monkeypatch, at
):
    """While the others prepare, or later: no state is pushed to one that prepares itself."""
    undisturbed = opened(personal(tmp_path / "whole", 4)).run(range(3))
    opened(personal(tmp_path / "parts", 2)).run(range(3))
    started = []

    def without_it(members, cohort, limit_s, recorded):
        assert "d1" in recorded
        while not members.by_name.keys() >= {"d0", "d2"}:
            members.poll(0.1)

    def start_it(run, event):
        if event["event"] == at and not started:
            started.append(True)
            run.start(1)

    monkeypatch.setattr(server, "assemble", without_it)
    made = personal(tmp_path / "parts", 4)
    made.run.resume = "auto"
    run = opened(made, start_it).run((0, 2))
    assert run.error is None and not run.errors, (run.error, run.errors)
    assert not run.kinds("state_lost")
    assert_same_networks(run, undisturbed)


def test_personal_weights_are_the_newest_of_the_past_that_the_run_knows(double, tmp_path):
    made = support.config(tmp_path, (14,), name="chain", method="fl")
    made.aggregation.personal = "out/linear/bias"
    held = PersonalWeights(as_trained(made, support.chain()), 0)
    (name,) = held.tensors()
    start, held.run = held.tensors()[name], "ab"

    def kept(*rounds):
        return [(number, {name: np.full_like(start, number)}) for number in rounds]

    for rounds, found, expected in (
        (5, kept(3, 7), 3), (5, kept(2), 3), (6, kept(), 3), (6, kept(4, 6, 5), 6),
        (4, kept(2, 8), 2), (1, kept(2), 0),
    ):  # fmt: skip
        held.go_back(rounds, found)
        assert held.rounds == expected
        wanted = np.full_like(start, expected) if expected else start
        np.testing.assert_array_equal(held.tensors()[name], wanted)
    held.recall(kept(9)[0][1], 9)
    held.save(tmp_path / "d0", "d0")
    ((rounds, found),) = held.saved(tmp_path / "d0")
    assert rounds == 9 and found[name][0] == 9
    held.run = "cd"
    assert not held.saved(tmp_path / "d0") and not held.saved(tmp_path)


def test_states_of_a_past_that_a_run_has_left_are_not_taken_for_its_own(tmp_path):
    files = StateFiles("d0", [tmp_path], lambda tag, reason: None)
    for rounds in (1, 2, 3):
        files.save(StateTag("ab", rounds), {"w": np.full(2, rounds)})
    files.save(StateTag("cd", 9), {"w": np.full(2, 9)})
    files.close()
    files = StateFiles("d0", [tmp_path], lambda tag, reason: None)
    ((rounds, found),) = files.newest(StateTag("ab", 7))
    assert rounds == 3 and found["w"][0] == 3
    assert [one[0] for one in files.newest(StateTag("ab", 2))] == [2]
    (tmp_path / "ab-3.safetensors").write_bytes(b"torn")
    assert [one[0] for one in files.newest(StateTag("ab", 7))] == [2]
    files.leave_behind(StateTag("ab", 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ab-2.safetensors", "cd-9.safetensors"
    ]  # fmt: skip
    assert not files.newest(StateTag("ab", 1)) and not files.newest(StateTag("ef", 1))
    files.close()
