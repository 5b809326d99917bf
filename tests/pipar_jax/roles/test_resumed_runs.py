"""What a run that goes on takes over, and what it refuses: its length, its end, its weights."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pipar_jax.config import StopConfig, membership_script
from pipar_jax.config.checkpoints import CHECKPOINTS, WEIGHTS, weights_of
from pipar_jax.disk.event_log import read_events
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch import machine
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.event_lines import LINES
from pipar_jax.roles.whole_weights import whole_weights
from pipar_jax.training import checkpoint
from tests.pipar_jax.roles import test_checkpoints
from tests.pipar_jax.roles.test_checkpoints import (
    SAMPLES,
    again,
    assert_equal,
    resumed,
    rounds_of,
    setting,
)
from tests.pipar_jax.runtime import support

kept = test_checkpoints.kept  # the fixture: a run of two rounds with checkpoints


def test_weights_of_before_are_put_away_once_a_run_goes_on(double, tmp_path):
    """Nobody takes them for those of the moment: not load, nor export, nor another run."""
    whole = support.trained(setting(tmp_path / "whole", "pipar", epochs=4), SAMPLES)
    made = setting(tmp_path, "pipar", epochs=1, every_rounds=1)
    first = support.trained(made, SAMPLES)
    assert checkpoint.facts(first.folder / WEIGHTS)["rounds"] == 1
    support.crash(resumed(made, 4), SAMPLES, after=2)
    assert not (first.folder / WEIGHTS).exists()
    kept = checkpoint.read_tensors(first.folder / "weights-1.safetensors")
    for unit, arrays in first.params.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(kept[f"{unit}/{name}"], array)
    with pytest.raises(RunError, match=r"is not over and has no weights.* after 2 rounds"):
        load(first.folder)
    assert weights_of(first.folder, "it") == (first.folder, 2)
    newest = whole_weights(first.folder).tensors
    assert not all(np.array_equal(newest[name], array) for name, array in kept.items())
    made.name = "other"
    made.run.resume, made.model.weights = "", str(first.folder)
    made.optimizer.learning_rate, made.epochs = 1e-300, 1
    begun = support.trained(made, SAMPLES)
    for unit, arrays in begun.params.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(newest[f"{unit}/{name}"], array)
    again = setting(tmp_path, "pipar", every_rounds=1)
    assert_equal(support.trained(resumed(again, 4), SAMPLES), whole)
    assert (first.folder / "weights-1.safetensors").is_file()


def test_a_run_that_begins_anew_in_its_folder_puts_weights_away_too(double, tmp_path):
    """One without checkpoints has nothing to go on from."""
    made = setting(tmp_path, "fl", epochs=1)
    first = support.trained(made, SAMPLES)
    made.checkpoint.every_rounds = 1
    events = []
    second = support.trained(resumed(made, 2), SAMPLES, None, events)
    assert second.folder == first.folder and rounds_of(second) == [0, 1]
    assert not [e for e in events if e["event"] == "run_resumed"]
    assert (first.folder / "weights-1.safetensors").is_file()


def test_a_short_last_round_is_no_gap_in_a_longer_run(double, tmp_path):
    """Rounds of three steps, two steps an epoch: every step of the epochs is taken, and once."""
    made = setting(tmp_path, "pipar", epochs=1, every_rounds=1)
    made.aggregation.every, made.optimizer.schedule = "3 steps", "cosine"
    support.trained(made, SAMPLES)
    for epochs in (2, 4):
        run = support.trained(resumed(made, epochs), SAMPLES)
        epoch = [row["epoch"] for row in run.metrics if row["event"] == "round_finished"]
        assert epoch[-1] == epochs and epoch == sorted(epoch)
    script = read_events(run.folder / membership_script.FILE, "round")
    spans = [(begin, end) for row in script for device, begin, end in row["spans"] if not device]
    assert spans == [(0, 2), (2, 4), (4, 7), (7, 8)]


def test_fewer_rounds_than_are_over_are_refused(double, kept, tmp_path):
    made = again(kept, tmp_path)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS / "2")  # it was interrupted after one of two
    for rounds, field in ((0, "epochs"), (1, r"run\.rounds")):
        made.epochs, made.run.rounds = 1, rounds
        says = rf"has 1 rounds behind it, and with {field}=1 the run has 1: raise {field} to go on"
        with pytest.raises(ConfigError, match=says):
            support.trained(made, SAMPLES)
    assert (tmp_path / "run" / WEIGHTS).is_file()


def test_a_run_that_has_stopped_goes_on_if_what_stopped_it_is_changed(double, tmp_path):
    made = setting(tmp_path, "pipar", epochs=3, every_rounds=1)
    made.run.evaluate_every, made.stop.metric, made.stop.target = 1, "loss", 1e6
    assert rounds_of(support.trained(made, SAMPLES)) == [0]
    made.run.resume = "auto"
    says = r"has ended after 1 rounds, since loss .* has reached stop\.target=.*: change what has"
    with pytest.raises(ConfigError, match=says):
        support.trained(made, SAMPLES)
    made.stop = StopConfig()
    assert rounds_of(support.trained(made, SAMPLES)) == [0, 1, 2]


def test_a_command_with_weights_to_start_from_is_its_own_restart(double, kept, tmp_path):
    weights = shutil.copy(kept.folder / WEIGHTS, tmp_path / "start.safetensors")

    def make(folder, epochs):
        made = resumed(setting(folder, "pipar", every_rounds=1), epochs)
        made.model.weights = str(weights)
        return made

    whole = support.trained(make(tmp_path / "whole", 2), SAMPLES)
    support.trained(make(tmp_path, 1), SAMPLES)
    (tmp_path / "start.safetensors").unlink()  # it is for the start alone
    machine.check(resolve(make(tmp_path, 2)))
    events = []
    assert_equal(support.trained(make(tmp_path, 2), SAMPLES, None, events), whole)
    (told,) = [event for event in events if event["event"] == "run_resumed"]
    assert LINES["run_resumed"](told).endswith("after round 1, and reads no model.weights")
    made = make(tmp_path / "new", 1)
    with pytest.raises(ConfigError, match=r"model\.weights=.* is not there"):
        machine.check(resolve(made))
    made.run.resume = str(kept.folder)
    with pytest.raises(ConfigError, match=r"both say where .* or write run\.resume=auto"):
        resolve(made)
