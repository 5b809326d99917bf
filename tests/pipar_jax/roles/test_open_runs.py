"""Devices come and go in the midst of whole runs, which go on as the configuration says."""

from __future__ import annotations

import statistics
import threading

import numpy as np
import pytest

from pipar_jax.errors import PeerError, RunError
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles.open_runs import (
    SAMPLES,
    OpenRun,
    before_batch,
    config,
    equal,
    pause_until_there,
    replayed,
    together,
)

METHODS = ("fl", "sfl", "pipar", "sl", "mpsl")


def mostly(*soaked):
    """Returns all methods, some for `make soak` alone: each has other tests here besides."""
    return [pytest.param(name, marks=[pytest.mark.soak] * (name in soaked)) for name in METHODS]


def after(round_, act):
    """Does something once, when a round is over."""
    done = []

    def when(run, event):
        if event["event"] == "round_finished" and event["round"] == round_ and not done:
            done.append(True)
            act(run)

    return when


@pytest.mark.sampled(3)
@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("method", METHODS)
def test_a_lost_device_is_left_out_and_the_script_replays_the_run(tmp_path, method, state):
    made = config(tmp_path, method, quorum=2, optimizer_state=state)
    run = OpenRun(made, when=after(0, lambda run: run.end(1))).run(range(3))
    assert run.error is None
    assert [event["device"] for event in run.kinds("device_lost")] == [1]
    script = run.script()
    assert [row["round"] for row in script] == [0, 1, 2, 3]
    assert script[0]["commit"] == [0, 1, 2] and script[-1]["commit"] == [0, 2]
    assert run.kinds("run_finished")[0]["losses"] == [
        {"device": 1, "round": row["round"], "step": row["out"][0]["step"], "why": "lost"}
        for row in script if row["out"]
    ]  # fmt: skip
    assert equal(run.weights(), replayed(tmp_path, made, run))


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("method", mostly("sfl", "sl"))
def test_a_device_that_is_lost_comes_back_with_the_weights_of_the_moment(tmp_path, method):
    made = config(tmp_path, method, rounds=12, quorum=1, wait_s=0.2)
    when = together(after(0, lambda run: run.end(1)), after(2, lambda run: run.start(1)))
    slowly = pause_until_there()
    run = OpenRun(made, when=together(when, slowly)).run(range(3))
    assert run.error is None
    assert [event["device"] for event in run.kinds("device_returned")] == [1]
    assert run.kinds("run_finished")[0]["returns"] == [1]
    script = run.script()
    back = next(row for row in script[3:] if any(span[0] == 1 for span in row["spans"]))
    assert back["fresh"] == [1] and back["commit"] == [0, 1, 2]
    first = next(span[1] for span in back["spans"] if span[0] == 1)
    counted = sum(2 for row in script[: back["round"]] if 1 in row["commit"])
    assert first == counted  # its own next step, whatever the others did meanwhile
    assert equal(run.weights(), replayed(tmp_path, made, run))


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("method", mostly("fl", "sfl"))
def test_a_device_may_join_late(tmp_path, method):
    made = config(tmp_path, method, rounds=12, min_devices=2, quorum=2, wait_s=0.1)
    when = together(after(0, lambda run: run.start(2)), pause_until_there())
    run = OpenRun(made, when=when).run(range(2))
    assert run.error is None
    script = run.script()
    assert script[0]["commit"] == [0, 1] and script[-1]["commit"] == [0, 1, 2]
    assert equal(run.weights(), replayed(tmp_path, made, run))


def test_a_late_device_takes_the_learning_rate_of_the_moment(tmp_path):
    """The rate drops to almost nothing after the first round: later training changes nothing."""
    weights = []
    for rounds in (1, 12):
        made = config(tmp_path / str(rounds), "pipar", rounds=rounds, quorum=2, wait_s=0.1)
        made.cohort.min_devices, made.optimizer.momentum = 2, 0.0
        made.optimizer.schedule, made.optimizer.drop_every = "step", 2
        made.optimizer.drop_factor = 1e-9
        when = together(after(0, lambda run: run.start(2)), pause_until_there())
        run = OpenRun(made, when=when if rounds > 1 else None).run(range(2))
        assert run.error is None
        weights.append(run.weights())
    assert run.script()[-1]["commit"] == [0, 1, 2]
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, atol=1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", mostly("fl", "pipar"))
def test_more_devices_than_configured_take_part_once_they_have_come(tmp_path, method):
    made = config(tmp_path, method, rounds=12, samples=SAMPLES[:2], quorum=2, wait_s=0.1)
    made.devices.count, made.devices.more = 2, 2
    made.data.source = "module:none:none"
    when = together(after(0, lambda run: run.start(3)), pause_until_there())
    run = OpenRun(made, (*SAMPLES, 9), when=when).run(range(2))
    assert run.error is None
    script = run.script()
    assert script[0]["commit"] == [0, 1] and script[-1]["commit"] == [0, 1, 3]
    assert all(row["cohort"] == [0, 1, 2, 3] for row in script)
    made.name, made.cohort.script = "replay", str(run.folder / "membership.jsonl")
    again = OpenRun(made, (*SAMPLES, 9)).run((0, 1, 3))
    assert equal(run.weights(), again.weights())


def test_the_tuner_plans_for_devices_that_are_not_there_yet(tmp_path):
    made = config(tmp_path, "auto", rounds=3, min_devices=2, quorum=1, wait_s=0.1)
    made.tuner.sizes, made.tuner.methods = "2,7", "fl,pipar"
    run = OpenRun(made).run((0, 2))
    assert run.error is None
    first, absent, third = run.kinds("tuned")[0]["profile"]["devices"]
    assert absent["host"] in (first["host"], third["host"])
    assert absent["up"]["rate_bytes_s"] == min(
        first["up"]["rate_bytes_s"], third["up"]["rate_bytes_s"]
    )
    assert [row["commit"] for row in run.script()] == [[0, 2]] * 3


def test_the_tuner_plans_for_places_that_any_device_may_take(tmp_path):
    made = config(tmp_path, "auto", rounds=3, size=2)
    made.tuner.sizes, made.tuner.methods = "2,7", "fl,pipar"
    run = OpenRun(made).run(range(3))
    assert run.error is None
    first, second = run.kinds("tuned")[0]["profile"]["devices"]
    assert first == second
    assert all(len(row["commit"]) == 2 for row in run.script())


def test_too_few_devices_end_the_run_in_one_line(tmp_path):
    made = config(tmp_path, quorum=3)
    run = OpenRun(made, when=after(0, lambda run: run.end(1))).run(range(3))
    assert isinstance(run.error, PeerError) and "\n" not in str(run.error)
    assert "cohort.below=repeat" in str(run.error) or "device 1" in str(run.error)


def test_a_round_below_the_quorum_is_repeated_when_the_quorum_is_there(tmp_path):
    made = config(tmp_path, quorum=3, below="repeat", wait_s=60.0)
    when = together(
        after(0, lambda run: run.end(1)),
        lambda run, event: run.start(1) if event["event"] == "device_lost" else None,
    )
    run = OpenRun(made, when=when).run(range(3))
    assert run.error is None
    script = run.script()
    assert [row["round"] for row in script if row["commit"]] == [0, 1, 2, 3]
    assert all(row["commit"] in ([], [0, 1, 2]) for row in script)


@pytest.mark.parametrize("method", [pytest.param("fl", marks=pytest.mark.soak), "pipar"])
def test_a_late_device_is_left_out_of_the_round_and_takes_part_again(tmp_path, monkeypatch, method):
    dropped = threading.Event()
    before_batch(monkeypatch, 1, 2, lambda: dropped.wait(PATIENCE_S))
    made = config(tmp_path, method, rounds=8, quorum=2, deadline_s=8.0)

    def go_on(run, event):
        if event["event"] == "device_dropped":
            dropped.set()

    run = OpenRun(made, when=together(go_on, pause_until_there(seconds=0.4))).run(range(3))
    assert run.error is None and not run.errors
    outs = [out for row in run.script() for out in row["out"]]
    assert any(out["place"] == 1 and out["why"] == "late" for out in outs)
    late = next(row["round"] for row in run.script() if row["out"])
    assert [(e["device"], e["round"] > late) for e in run.kinds("device_again")] == [(1, True)]
    assert run.script()[-1]["commit"] == [0, 1, 2]


def test_the_first_to_finish_end_the_round(tmp_path):
    run = OpenRun(config(tmp_path, "fl", first=2)).run(range(3))
    assert run.error is None
    assert all(len(row["commit"]) >= 2 for row in run.script())


@pytest.mark.parametrize("nonfinite", ["drop", "end"])
def test_a_device_of_which_something_is_not_finite_is_dropped(tmp_path, nonfinite):
    made = config(tmp_path, "fl", rounds=2, quorum=2)
    made.run.nonfinite = nonfinite
    run = OpenRun(made)
    run.data[1].train.x[:] = 1e30
    run.run(range(3))
    if nonfinite == "end":
        assert isinstance(run.error, RunError)
        return
    assert run.error is None
    assert all(row["commit"] == [0, 2] for row in run.script())
    assert [out["why"] for out in run.script()[0]["out"]] == ["nonfinite"]
    assert all(np.isfinite(array).all() for array in run.weights().values())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_cohort_is_drawn_from_the_population(tmp_path, method):
    samples = (14, 21, 7, 14, 9)
    made = config(tmp_path, method, rounds=6, samples=samples, size=2)
    run = OpenRun(made, samples).run(range(5))
    assert run.error is None
    script = run.script()
    assert all(len(row["commit"]) == 2 for row in script)
    assert len({device for row in script for device in row["cohort"]}) > 2
    made.name = "again"
    assert equal(run.weights(), OpenRun(made, samples).run(range(5)).weights())


def test_a_run_with_more_devices_than_configured_is_resumed_bit_for_bit(tmp_path):
    def trained(folder, rounds, resume=""):
        made = config(tmp_path / folder, "pipar", rounds, SAMPLES[:2], min_devices=3, quorum=2)
        made.devices.count, made.devices.more = 2, 1
        made.data.source = "module:none:none"
        made.checkpoint.every_rounds, made.run.resume = 1, resume
        run = OpenRun(made, SAMPLES).run(range(3))
        assert run.error is None, run.error
        return run

    whole = trained("whole", 4)
    trained("parts", 2)
    resumed = trained("parts", 4, "auto")
    assert [row["rounds"] for row in resumed.kinds("run_resumed")] == [2]
    assert not resumed.kinds("state_lost")
    assert [row["commit"] for row in resumed.script()] == [[0, 1, 2]] * 4
    assert resumed.script() == whole.script() and equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize(("every", "rounds"), [("epoch", 3), ("1 steps", 4), ("5 steps", 2)])
def test_epochs_are_counted_where_rounds_are_given(tmp_path, every, rounds):
    """Two steps are an epoch here; ``epochs`` says nothing about a run of so many rounds."""
    made = config(tmp_path, samples=(14, 14))
    made.aggregation.every, made.run.rounds, made.epochs = every, rounds, 10
    run = OpenRun(made, samples=(14, 14)).run((0, 1))
    assert run.error is None
    of_round = 1.0 if every == "epoch" else int(every.split()[0]) / 2
    (began,), (ended,) = run.kinds("run_started"), run.kinds("run_finished")
    done = run.kinds("round_finished")
    assert began["epochs"] == of_round * rounds
    assert [one["epoch"] for one in done] == [of_round * (i + 1) for i in range(rounds)]
    epochs = {}
    for one in done:
        spent = epochs.setdefault(int(one["round"] * of_round), [0.0, 0.0])
        spent[0], spent[1] = spent[0] + one["seconds"], spent[1] + of_round
    expected = statistics.median(seconds / share for seconds, share in epochs.values())
    assert ended["epoch_seconds"] == pytest.approx(expected)


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("method", ["fl", "sfl", "pipar"])
def test_a_round_that_was_undone_is_done_anew_by_those_that_had_finished(
    tmp_path, monkeypatch, method
):
    """It ends as if nothing had happened, and what it took is all of its attempts."""
    lost = threading.Event()

    def start_again(run, event):
        if event["event"] == "device_lost":
            lost.set()
            run.start(1)

    def end():
        run.end(1)
        lost.wait(PATIENCE_S)  # in the midst of a round

    made = config(tmp_path, method, quorum=3, below="repeat", wait_s=60.0)
    made.optimizer.momentum = 0.0  # whoever comes back begins with a fresh one
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name = "disturbed"
    run = OpenRun(made, when=start_again)
    before_batch(monkeypatch, 1, 2, end)
    run.run(range(3))
    assert run.error is None
    rows = run.kinds("round_finished")
    assert len({one["round"] for one in rows}) < len(rows)  # one was undone
    seconds = {}
    for one in rows:
        seconds[one["round"]] = seconds.get(one["round"], 0.0) + one["seconds"]
    (ended,) = run.kinds("run_finished")
    assert ended["epoch_seconds"] == pytest.approx(statistics.median(seconds.values()))
    assert equal(run.weights(), undisturbed)


def test_weights_on_their_way_do_not_end_a_device_that_was_dropped(tmp_path):
    """The others end the round while its weights crawl; what it says next comes behind them."""
    made = config(tmp_path, "fl", rounds=3, quorum=2, first=2)
    made.devices.overrides = {2: {"link": "0.4/100"}}
    run = OpenRun(made).run((0, 1, 2))
    assert run.error is None and not run.errors
    assert run.kinds("device_dropped") and not run.kinds("device_lost")
