"""Progress: what it makes of a run's events, and what it leaves on the terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from pipar_jax.report import progress as progress_module
from pipar_jax.report.event_lines import losses_text
from pipar_jax.report.progress import ProgressDisplay, render
from pipar_jax.report.run_state import RunState, describe
from stages import make_task

TASK = make_task().facts()
STARTED = {
    "event": "run_started",
    "time_s": 2.0,
    "method": "pipar",
    "plan": "cut 1, N = 4",
    "devices": 2,
    "rounds": 4,
    "epochs": 4,
    "steps": [40, 40],
    "model": "cnn",
    "parameters": 1000,
    "task": TASK,
}
LEARNT = {
    "event": "progress",
    "time_s": 3.0,
    "device": 0,
    "step": 4,
    "loss": 0.5,
    "metrics": {"accuracy": 0.75},
}
ROUND = {
    "event": "round_finished",
    "time_s": 4.0,
    "round": 0,
    "rounds": 4,
    "epoch": 1,
    "seconds": 2.0,
    "loss": 0.25,
    "metrics": {"accuracy": 0.875},
    "samples": 1000,
    "idle": {"server": 0.5, "d0": 0.25, "d1": 0.0},
    "busy": {"server": 1.0, "d0": 1.5, "d1": 2.0},
    "bytes_up": 1_000_000,
    "bytes_down": 500_000,
}
EVALUATED = {
    "event": "evaluated", "time_s": 4.5, "round": 0, "epoch": 1.0, "metrics": {"accuracy": 0.9},
}  # fmt: skip
FINISHED = {
    "event": "run_finished", "time_s": 9.0, "seconds": 7.0, "metrics": {"accuracy": 0.95},
    "task": TASK, "idle": {},
}  # fmt: skip
EVENTS = [
    {"event": "listening", "time_s": 0.0, "host": "127.0.0.1", "port": 1},
    {"event": "waiting", "time_s": 0.5, "missing": ["d1"]},
    {"event": "device_joined", "time_s": 1.0, "device": 1, "samples": 719},
    {"event": "prepared", "time_s": 1.5, "compile_s": 1.0, "calibration_s": 0.1},
    STARTED,
    LEARNT,
    ROUND,
    EVALUATED,
    FINISHED,
]


def _followed(*events: dict) -> RunState:
    state = RunState()
    for event in events:
        state.follow(event, now_s=100.0 + event["time_s"])
    return state


def _text(state: RunState, now_s: float = 110.0) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(state, now_s, "2/4 PiPar"))
    return console.file.getvalue()


def test_the_fraction_counts_rounds_and_the_steps_of_every_device() -> None:
    assert _followed(STARTED).fraction == 0.0
    assert _followed(STARTED, LEARNT).fraction == pytest.approx(5 / 80)
    other = LEARNT | {"device": 1, "step": 2}
    assert _followed(STARTED, LEARNT, other).fraction == pytest.approx(8 / 80)
    assert _followed(STARTED, LEARNT, ROUND).fraction == 0.25
    assert _followed(STARTED, LEARNT, ROUND, FINISHED).fraction == 1.0


def test_the_expected_end_follows_from_the_fraction() -> None:
    state = _followed(STARTED, ROUND)
    # Begun at 102 s, a quarter done at 104 s: six seconds to go.
    assert state.left_s(104.0) == pytest.approx(6.0)
    assert _followed(STARTED).left_s(104.0) is None
    assert _followed(STARTED, FINISHED).left_s(104.0) == 0.0


def test_a_resumed_run_is_expected_to_end_by_what_is_left_of_it() -> None:
    resumed = {**STARTED, "resumed": 2}
    state = _followed(resumed)
    assert state.fraction == 0.5 and state.rounds_done == 2
    assert state.left_s(104.0) is None  # nothing is known of its speed yet
    state = _followed(resumed, {**ROUND, "round": 2})
    # Begun at 102 s, a quarter of the run done by 104 s and a quarter to go.
    assert state.fraction == 0.75 and state.left_s(104.0) == pytest.approx(2.0)
    assert _followed({**STARTED, "resumed": 4}).left_s(104.0) is None


def test_a_round_gives_throughput_link_use_and_busy_shares() -> None:
    state = _followed(STARTED, ROUND, EVALUATED)
    assert state.samples_per_s == 500.0
    assert (state.up_mbps, state.down_mbps) == (4.0, 2.0)
    text = _text(state)
    for piece in (
        "2/4 PiPar",
        "round 2/4",
        "loss 0.250",
        "accuracy 87.5%",
        "test 90.0%",
        "500 samples/s",
        "4.0 Mbit/s up, 2.0 down",
        "busy: server 50%, d0 75%, d1 100%",
    ):
        assert piece in text, text


def test_before_training_it_says_what_it_waits_for() -> None:
    assert "waiting for d1" in _text(_followed(EVENTS[0], EVENTS[1]))
    assert "719 samples" in _text(_followed(*EVENTS[:3]))


def test_what_the_tuner_chose_is_said() -> None:
    tuned = {"event": "tuned", "time_s": 1.2, "plan": "device|2|server x6", "epoch_s": 1.625}
    state = _followed(*EVENTS[:3], tuned)
    expected = "tuned to device|2|server x6: 1.62 s per epoch predicted"
    assert expected in _text(state)
    assert describe(tuned, state) == expected


def test_a_failure_is_said() -> None:
    state = _followed(STARTED, {"event": "failed", "time_s": 3.0, "error": "d1 is gone"})
    assert state.phase == "failed"
    assert describe({"event": "failed", "error": "d1 is gone"}, state) == "failed: d1 is gone"


def test_away_from_a_terminal_it_prints_plain_lines() -> None:
    out = io.StringIO()
    with ProgressDisplay(
        "2/4 PiPar", console=Console(file=out, width=100, highlight=False)
    ) as progress:
        for event in EVENTS:
            progress(event)
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert all(re.match(r" *\d+\.\d s  \S", line) for line in text.splitlines())
    assert "2/4 PiPar: round 1 of 4 took 2.00 s, loss 0.250" in text
    assert "test accuracy 90.0% after epoch 1" in text
    assert "finished in 7.0 s, test accuracy 95.0%" in text
    # Steps come too often for a log.
    assert "step 5" not in text


@pytest.mark.parametrize("fails", [False, True])
def test_the_terminal_is_given_back_however_the_run_ends(fails: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)

    def follow() -> None:
        with ProgressDisplay(console=console) as progress:
            for event in EVENTS[:6]:
                progress(event)
            if fails:
                raise KeyboardInterrupt
            progress.close()
            progress(ROUND)  # a late event starts nothing again

    if fails:
        with pytest.raises(KeyboardInterrupt):
            follow()
    else:
        follow()
    text = out.getvalue()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hidden) == text.count(shown) == 1
    assert text.rindex(shown) > text.rindex(hidden)


def test_what_takes_long_is_said_with_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sits before a silent screen while hosts compile: a line after some seconds."""
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    shown = ProgressDisplay("PiPar", console=Console(file=out, width=100, highlight=False))
    working = {"event": "working", "host": "d0", "what": "compiling", "of": 40}
    for second in range(31):
        now[0] = float(second)
        shown({**working, "done": second, "time_s": now[0]})
    lines = out.getvalue().splitlines()
    assert [line.split("PiPar: ")[1] for line in lines] == [
        f"d0 is compiling: {done} of 40" for done in (10, 20, 30)
    ]
    shown({"event": "working", "host": "server", "what": "timing", "done": 0, "of": 0})
    assert shown.state.phase == "server is timing"
    shown({"event": "saving", "file": "weights.safetensors", "time_s": 1.0})
    assert out.getvalue().endswith("saving weights.safetensors\n")
    shown({"event": "not_kept", "reason": "no space left on the disk", "time_s": 1.0})
    assert "some of its output is not saved: no space left on the disk" in out.getvalue()


def test_no_phase_is_silent_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling one function may take a minute, in which no host has anything to tell."""
    monkeypatch.setattr(progress_module, "PLAIN_PROGRESS_S", 0.02)
    out = io.StringIO()

    def wait_for(line: str) -> None:
        deadline = time.monotonic() + 60.0
        while out.getvalue().count(f"s  PiPar: {line}\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert out.getvalue().count(f"s  PiPar: {line}\n") >= 2, out.getvalue()

    with ProgressDisplay("PiPar", console=Console(file=out, width=100, highlight=False)) as shown:
        wait_for("starting")
        shown({"event": "working", "host": "d0", "what": "compiling", "done": 0, "of": 0})
        wait_for("d0 is compiling")
        shown(STARTED)
        wait_for(f"step 0 of {sum(STARTED['steps'])} of all devices")
        shown(FINISHED)
        told = out.getvalue()
        time.sleep(0.1)
        assert out.getvalue() == told  # what is over is not told again
    stamps = [float(line.split()[0]) for line in told.splitlines()]
    assert stamps == sorted(stamps)


def test_after_a_host_was_busy_the_bar_comes_back() -> None:
    busy = {"event": "working", "time_s": 1.0, "host": "d0", "what": "timing", "done": 1, "of": 2}
    state = _followed(STARTED, busy)
    assert state.phase == "d0 is timing: 1 of 2"
    state.follow({"event": "progress", "device": 0, "step": 0, "loss": 1.0}, 1.0)
    assert state.phase == "training"


def test_who_is_gone_is_shown_until_it_is_back() -> None:
    lost = {"event": "device_lost", "device": 1, "reason": "device 1 was lost: it is silent",
            "time_s": 3.0}  # fmt: skip
    left = {"event": "device_left", "device": 0, "reason": "it was asked to", "time_s": 3.0}
    back = {"event": "device_returned", "device": 1, "away_s": 2.0, "time_s": 5.0}
    state = _followed(STARTED, lost, left)
    assert describe(lost, state) == "device 1 was lost: it is silent"
    assert describe(left, state) == "device 0 is out: it was asked to"
    assert "without d0, d1" in _text(_followed(STARTED, lost, left, ROUND))
    assert "without d0 " in _text(_followed(STARTED, lost, left, back, ROUND))


def test_the_end_says_who_was_left_out_and_who_came_back() -> None:
    assert losses_text(FINISHED) == ""
    some = [{"device": 2, "round": 0, "step": 0, "why": "late"}]
    many = [{"device": 0, "round": index, "step": 3, "why": "lost"} for index in range(12)]
    text = losses_text({**FINISHED, "losses": some + many, "undone": 1, "returns": [0, 0]})
    assert text == (
        "left out: device 0 of rounds 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more, device 2 of round "
        "1; came back: device 0; 1 round was repeated"
    )


def test_a_private_run_says_its_past_and_its_clip() -> None:
    promise = {"event": "private", "words": ["one", "two"], "noise": {"d0": 2.0, "d1": 3.0}}
    state = _followed(STARTED)
    new = describe({**promise, "epsilon": {}}, state)
    assert new == "privacy, noise multiplier 2 to 3: one; two"
    resumed = describe({**promise, "epsilon": {"d0": 1.5, "d1": 2.5}}, state)
    assert resumed is not None and "2 to 3, epsilon 2.5 released before: one" in resumed
    row = ROUND | {"epsilon": {"d0": 4.0, "d1": 3.0}, "delta": 1e-5, "clip": 0.5}
    said = describe(row, _followed(STARTED, row))
    assert said is not None and "epsilon 4 at delta 1e-05, next clip 0.5" in said
