"""A device may be lost at any point of a round, by any method: the run goes on, and is replayed.

Where the round is repeated until all are there, it ends with the bits of a run without losses.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from comms import codec_names
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles.open_runs import (
    OpenRun,
    Points,
    config,
    equal,
    lose,
    replayed,
    told,
)

#: Points on a thread of device 1, and the step or round from which on.
OWN = {
    "in a step": ("batch", 3),
    "before its weights": ("before Trained", 1),
    "after its weights": ("Trained", 1),
    "before it has stored": ("before Stored", 1),
    "when it has stored": ("Stored", 1),
}
#: Points on the server's thread, and the call from which on.
SERVERS = {
    "before the average": ("average", 1),
    "before the count": ("count", 1),
    "at an evaluation": ("evaluate", 0),
    "at a checkpoint": ("take", 0),
    "before weights of the moment": ("bring_up_to_date", 1),
}
METHODS = ("fl", "sfl", "pipar", "pipar shared", "sl", "mpsl")
#: What is tried in `make test` of methods beside PiPar.
QUICK = ("in a step",)


def cases(methods, quick, every=()):
    """All methods at all points; most of them for `make soak`."""
    for method in methods:
        for point in (*OWN, *SERVERS):
            soaked = method not in every and point not in quick
            marks = [pytest.mark.soak] if soaked else []
            yield pytest.param(method, point, marks=marks, id=f"{method} {point}")


@pytest.fixture
def points(monkeypatch):
    return Points(monkeypatch)


def setting(tmp_path, method, **cohort):
    name, _, weights = method.partition(" ")
    made = config(tmp_path, name, rounds=3, **cohort)
    made.run.evaluate_every = made.checkpoint.every_rounds = 1
    if weights:
        made.pipeline.weights, made.pipeline.dispatch = "shared", "fixed"
    return made


def lose_at(points, run, point):
    """Device 1 is lost at a point."""
    if point in OWN:
        points.once(OWN[point][0], "d1", OWN[point][1], lambda: lose(run, 1))
        return

    def end():
        run.end(1)
        time.sleep(0.3)  # it has ended by then, or not: either is a case

    points.once(SERVERS[point][0], "server", SERVERS[point][1], end)


def right(run, *lost):
    """The run has ended as it should, and no other device with an error."""
    assert run.error is None, run.error
    wrong = {i: error for i, error in run.errors.items() if "told to stop" not in str(error)}
    assert not wrong, wrong
    assert {one["device"] for one in run.kinds("device_lost")} <= set(lost)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("method", "point"), list(cases(METHODS, QUICK, every=("pipar",))))
def test_whoever_is_lost_is_left_out_and_the_script_replays_the_run(
    tmp_path, points, method, point
):
    made = setting(tmp_path, method, quorum=2)
    run = OpenRun(made)
    lose_at(points, run, point)
    run.run(range(3))
    assert not points.hooks  # it has come there
    right(run, 1)
    again, weights = replayed(tmp_path, made, run), run.weights()
    if "shared" in method:  # gradients are summed in the order in which they come
        for name, array in again.items():
            np.testing.assert_allclose(array, weights[name], rtol=1e-4, atol=1e-6)
    else:
        assert equal(again, weights)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "point"), list(cases(("fl", "pipar"), ("after its weights",))))
def test_where_rounds_are_repeated_nothing_is_left_of_a_loss(tmp_path, points, method, point):
    made = setting(tmp_path, method, quorum=3, below="repeat", wait_s=PATIENCE_S)
    made.optimizer.momentum = 0.0  # whoever comes back begins with a fresh one
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name = "disturbed"
    run = OpenRun(made, when=lambda run, e: e["event"] == "device_lost" and run.start(1))
    lose_at(points, run, point)
    run.run(range(3))
    assert not points.hooks
    right(run, 1)
    assert equal(run.weights(), undisturbed)


@pytest.mark.parametrize("method", [pytest.param("fl", marks=pytest.mark.soak), "pipar"])
def test_a_round_that_is_undone_twice_costs_no_optimiser_its_state(tmp_path, points, method):
    made = config(tmp_path, method, rounds=3, quorum=3, below="repeat", wait_s=PATIENCE_S)
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name, made.cohort.deadline_s = "disturbed", 1.0
    run = OpenRun(made)
    times: list[int] = []

    def be_late(point, host, step):
        if (point, host, step) == ("batch", "d1", 2) and len(times) < 2:
            times.append(step)
            told(run, "round_undone", len(times))

    points.hooks.append(be_late)
    run.run(range(3))
    right(run)
    assert len(run.kinds("round_undone")) >= 2
    assert equal(run.weights(), undisturbed)


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("codec", [
    pytest.param(name, marks=[] if name in ("raw", "int4") else [pytest.mark.soak])
    for name in codec_names()
])  # fmt: skip
def test_a_run_with_a_round_that_was_undone_is_replayed(tmp_path, points, codec):
    """Also where weights are sent by a codec: all begin anew from the same."""
    made = config(tmp_path, "fl", rounds=3, quorum=3, below="repeat", wait_s=PATIENCE_S)
    made.aggregation.codec, made.optimizer.momentum = codec, 0.0
    run = OpenRun(made, when=lambda run, e: e["event"] == "device_lost" and run.start(1))
    points.once("batch", "d1", 3, lambda: lose(run, 1))
    run.run(range(3))
    assert not points.hooks
    right(run, 1)
    assert run.kinds("round_undone")
    assert equal(replayed(tmp_path, made, run), run.weights())


@pytest.mark.parametrize("method", [pytest.param("fl", marks=pytest.mark.soak), "pipar"])
def test_who_is_back_before_a_round_is_counted_gets_the_weights_of_the_moment(
    tmp_path, points, method
):
    made = config(tmp_path, method, rounds=3, quorum=3, below="repeat", wait_s=PATIENCE_S)
    made.optimizer.momentum = 0.0
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name = "disturbed"
    run = OpenRun(made, when=lambda run, e: e["event"] == "device_lost" and run.start(1))
    points.once("Stored", "d1", 0, lambda: lose(run, 1))
    points.once("before Stored", "d0", 0, lambda: told(run, "device_returned", 1, 10.0))
    run.run(range(3))
    right(run, 1)
    assert equal(run.weights(), undisturbed)


@pytest.mark.parametrize("method", [pytest.param("fl", marks=pytest.mark.soak), "pipar"])
def test_who_is_lost_and_back_before_the_release_is_not_in_the_round(tmp_path, points, method):
    """It was chosen for it, and another one is given the weights of the moment meanwhile."""
    made = config(tmp_path, method, rounds=4, quorum=3, below="repeat", wait_s=PATIENCE_S)
    made.run.evaluate_every, made.optimizer.momentum = 1, 0.0
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name = "disturbed"

    def start_again(run, event):
        if event["event"] == "device_lost":
            run.start(event["device"])

    run = OpenRun(made, when=start_again)

    def lose_another():
        lose(run, 1)
        told(run, "device_returned", 2, 10.0)

    points.once("evaluate", "server", 0, lambda: (run.end(2), time.sleep(0.4)))
    points.once("before PushedState", "d2", -1, lose_another)
    run.run(range(3))
    right(run, 1, 2)
    assert equal(run.weights(), undisturbed)


@pytest.mark.parametrize("kind", ["Halted", "Rewound"])
@pytest.mark.parametrize("method", ["pipar", pytest.param("mpsl", marks=pytest.mark.soak)])
def test_where_gradients_are_summed_another_may_be_lost_while_all_go_back(
    tmp_path, points, method, kind
):
    made = setting(tmp_path, f"{method} shared", quorum=1)
    run = OpenRun(made)
    points.once("batch", "d1", 3, lambda: lose(run, 1))
    points.once(f"before {kind}", "d0", -1, lambda: lose(run, 0))
    run.run(range(3))
    right(run, 0, 1)


@pytest.mark.parametrize(("method", "how"), [("fl", "deadline"), ("pipar", "first")])
def test_who_is_late_in_the_last_round_ends_with_the_run(tmp_path, points, method, how):
    cohort = {"quorum": 2, "deadline_s": 2.0} if how == "deadline" else {"first": 2}
    made = config(tmp_path, method, rounds=2, **cohort)
    run = OpenRun(made)
    points.once("batch", "d1", 3, lambda: told(run, "run_finished", 1, 20.0))
    run.run(range(3))
    right(run)


def test_in_turns_what_was_handed_on_counts_whoever_gave_it(tmp_path, points):
    made = config(tmp_path, "sl", rounds=3, quorum=2)
    run = OpenRun(made)
    points.once("before Trained", "d1", 1, lambda: lose(run, 1))
    run.run(range(3))
    right(run, 1)
    (row,) = (row for row in run.script() if row["out"])
    assert row["commit"] == [0, 1, 2] and [out["place"] for out in row["out"]] == [1]
    points.hooks.clear()
    assert equal(replayed(tmp_path, made, run), run.weights())


def test_in_turns_of_a_step_nobody_trains_twice_what_it_has_handed_on(tmp_path, points):
    made = config(tmp_path, "sl", rounds=4, quorum=2)
    made.pipeline.hand_on = "step"

    def start_again(run, event):
        if event["event"] == "device_lost":
            run.start(1)
        if event["event"] == "round_finished":
            time.sleep(0.5)  # so that it is back before the last round

    run = OpenRun(made, when=start_again)
    points.once("ClientModel", "d1", -1, lambda: lose(run, 1))
    run.run(range(3))
    assert not points.hooks
    right(run, 1)
    script = run.script()
    trained = [
        step
        for row in script
        for place, first, stop in row["spans"]
        if place == 1
        for step in range(first, stop)
        if step < min([out["step"] for out in row["out"] if out["place"] == 1] or [99])
    ]
    assert len(trained) == len(set(trained)) > 1, script  # fmt: skip
    assert equal(replayed(tmp_path, made, run), run.weights())


@pytest.mark.soak
@pytest.mark.parametrize("what", ["prepares", "is late"])
def test_neighbours_meet_those_that_are_idle(tmp_path, points, what):
    """A device comes back to its chain while another one prepares, or is still at work."""
    late = {"deadline_s": 3.0} if what == "is late" else {}
    made = config(tmp_path, "mpsl", rounds=8, quorum=1, wait_s=30.0, **late)
    met = threading.Event()

    def when(run, event):
        if event["event"] == "round_finished" and event["round"] == 0:
            run.end(1)
            if what == "prepares":
                run.end(2)
        if event["event"] == "device_lost" and what == "prepares":
            run.start(event["device"])
        if event["event"] == "device_dropped" and event["device"] == 2 and what == "is late":
            run.start(1)
        if event["event"] == "round_finished" and event["round"] >= 1:
            time.sleep(1.0)

    run = OpenRun(made, when=when)
    if what == "prepares":

        def note_met(point, host, number):
            if (point, host) == ("Met", "d1") and run.kinds("device_returned"):
                met.set()

        points.hooks.append(note_met)

        def hold(point, host, number):
            if (point, host) == ("before Prepared", "d2") and run.kinds("device_returned"):
                met.wait(10)

        points.hooks.append(hold)
    else:
        points.once("batch", "d2", 3, lambda: time.sleep(9))
    run.run(range(3))
    right(run, 1, 2)
