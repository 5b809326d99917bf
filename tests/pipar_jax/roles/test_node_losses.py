"""Compute nodes are lost in the midst of whole runs, which go on over those that are left.

A chain that is cut anew trains what it would have trained anyhow: with copies of each round, a loss
before the commit or between two rounds leaves the weights of the undisturbed run.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time

import jax
import numpy as np
import psutil
import pytest

from pipar_jax.config import Config
from pipar_jax.errors import PeerError, RunError
from pipar_jax.launch.launcher import launch
from pipar_jax.methods.registry import METHODS, node_methods
from pipar_jax.roles import first_plan
from pipar_jax.roles.peer_links import PeerLinks
from tests.pipar_jax.roles.open_runs import OpenRun, Points, before_batch, config, together
from tests.pipar_jax.runtime import support

RTOL = 1e-9
SAMPLES, ROUNDS = (14, 21), 3
#: Methods over nodes with their policies for weights.
WAYS = [
    (method, way)
    for method in node_methods()
    for way in ("copy", "shared")
    if way == "copy" or not METHODS[method].one_device
]


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    yield support.chain()
    jax.config.update("jax_enable_x64", False)


def setting(folder, method, way="copy", nodes=3, **cohort):
    samples = SAMPLES[:1] if METHODS[method].one_device else SAMPLES
    made = config(folder, method, ROUNDS, samples, **cohort)
    home = METHODS[method].labels_home
    made.model.dtype = "float64"
    made.aggregation.every, made.epochs, made.run.rounds = "2 steps", 1, ROUNDS
    made.nodes.count, made.nodes.replicate_every = nodes, 1
    made.pipeline.cuts = ",".join(map(str, range(1, nodes + 1 + home)))
    made.pipeline.weights, made.pipeline.micro_batches = way, 2
    if way == "shared":
        made.pipeline.dispatch = "fixed"
    return made, samples


def when(event_name, round_, act):
    """Acts once, on the first event of a kind, in a round or after it if one is given."""
    done = []

    def follow(run, event):
        due = event["event"] == event_name and (round_ is None or event["round"] >= round_)
        if due and not done:
            done.append(True)
            act(run)

    return follow


def conducted(made, samples, network, follow=None):
    return OpenRun(made, samples, follow, network).run(range(len(samples)))


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[k] - other[k]).max() / np.abs(other[k]).max()) for k in one)


def replayed(made, samples, network, run):
    """Returns the weights of a run that loses nothing, and replays the script of one that did."""
    made.name, made.cohort.script = "replay", str(run.folder / "membership.jsonl")
    again = conducted(made, samples, network)
    assert again.error is None and not again.kinds("node_lost")
    assert again.script() == run.script()
    return again.weights()


@functools.cache
def undisturbed(method, way):
    """Returns the weights of a run without a loss."""
    with tempfile.TemporaryDirectory() as folder:
        made, samples = setting(pathlib.Path(folder), method, way)
        return conducted(made, samples, support.chain()).weights()


def losses():
    """Every node of every chain at every moment; `make test` runs two of each chain."""
    for method, way in WAYS:
        for moment, short in (("in a round", 2), ("between rounds", 1)):
            for node in (1, 2, 3):
                marks = [pytest.mark.soak] * (node != short)
                name = f"{method}-{way}-{moment}-{node}"
                yield pytest.param(method, way, moment, node, id=name, marks=marks)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("method", "way", "moment", "node"), [*losses()])
def test_a_lost_node_leaves_the_weights_of_the_undisturbed_run(
    tmp_path, monkeypatch, network, method, way, moment, node
):
    made, samples = setting(tmp_path, method, way)
    run = OpenRun(made, samples, None, network)
    if moment == "in a round":
        before_batch(monkeypatch, 0, 3, lambda: run.end_node(node))
    else:
        run.when = when("nodes_copied", 1, lambda run: run.end_node(node))
    run.run(range(len(samples)))
    assert run.error is None
    assert [event["node"] for event in run.kinds("node_lost")] == [node]
    (change,) = run.kinds("nodes_replaced")
    assert change["nodes"] == [f"n{node}"]
    (plan,) = run.kinds("replanned")
    assert f"n{node}" not in plan["plan"]
    assert run.kinds("run_finished")[0]["lost_hosts"] == [f"n{node}"]
    counted = [row["round"] for row in run.script() if row["commit"]]
    cut_short = way == "shared" and moment == "in a round"
    assert counted == ([0, 1, 1, 2] if cut_short else [0, 1, 2])
    if (moment, node) == ("in a round", 2):
        again = replayed(made, samples, network, run)
        assert again.keys() == run.weights().keys() and difference(again, run.weights()) < RTOL
    # Where gradients are summed, the first step of the round stays, but not on the lost node.
    if way == "copy" or moment == "between rounds":
        assert difference(run.weights(), undisturbed(method, way)) < RTOL


def test_the_last_node_ends_the_run_in_one_line(tmp_path, monkeypatch, network):
    made, samples = setting(tmp_path, "mpsl", nodes=1)
    run = OpenRun(made, samples, None, network)
    before_batch(monkeypatch, 0, 3, lambda: run.end_node(1))
    run.run(range(len(samples)))
    assert isinstance(run.error, PeerError) and "\n" not in str(run.error)
    assert "compute node 1 of the chain is gone, and no chain fits" in str(run.error)


def test_nodes_lost_one_after_another_leave_the_chain_to_the_last(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl")
    ends = together(
        when("nodes_copied", 0, lambda run: run.end_node(1)),
        when("nodes_copied", 1, lambda run: run.end_node(3)),
    )
    run = conducted(made, samples, network, ends)
    assert run.error is None
    assert [plan["to"]["devices"][0]["hosts"] for plan in run.kinds("replanned")] == [
        ["device", "n2", "n3", "device"], ["device", "n2", "device"],
    ]  # fmt: skip
    assert difference(run.weights(), undisturbed("mpsl", "copy")) < RTOL


def test_what_is_lost_after_the_commit_is_told(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl")
    run = conducted(made, samples, network, when("round_finished", 1, lambda run: run.end_node(2)))
    assert run.error is None
    (change,) = run.kinds("nodes_replaced")
    assert change["units"] == [{"unit": "fc3", "rounds": 1, "optimizer_rounds": 1}]
    assert difference(replayed(made, samples, network, run), run.weights()) < RTOL
    copied = [event["bytes"] for event in run.kinds("nodes_copied")]
    assert run.kinds("run_finished")[0]["copied_bytes"] == sum(copied) > 0


def test_without_copies_a_run_with_a_quorum_goes_on_from_the_last_evaluation(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl", quorum=1)
    made.nodes.replicate_every, made.run.evaluate_every = 0, 1
    run = conducted(made, samples, network, when("evaluated", 0, lambda run: run.end_node(2)))
    assert run.error is None and not run.kinds("nodes_copied")
    (change,) = run.kinds("nodes_replaced")
    assert change["units"] == [{"unit": "fc3", "rounds": 1, "optimizer_rounds": None}]
    assert difference(replayed(made, samples, network, run), run.weights()) < RTOL


def test_a_run_that_may_not_lose_nodes_ends_with_the_first(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl")
    made.nodes.replicate_every = 0
    run = conducted(made, samples, network, when("progress", 0, lambda run: run.end_node(2)))
    assert isinstance(run.error, PeerError) and "compute node 2" in str(run.error)


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_that_comes_back_takes_its_place_or_is_a_spare(tmp_path, network, nodes):
    """With one node the run waits for it; with two the other takes over, and then the first."""
    made, samples = setting(tmp_path, "mpsl", nodes=nodes, below="repeat", wait_s=60.0)
    again = when("node_lost", None, lambda run: run.start_node(1))

    made.run.rounds = rounds = 4
    others = (
        when("nodes_replaced", 0, lambda run: run.start_node(1)),
        when("nodes_copied", 2, lambda run: run.end_node(2)),
    )
    first = when("nodes_copied", 0, lambda run: run.end_node(1))
    run = conducted(made, samples, network, together(first, *([again] if nodes == 1 else others)))
    assert run.error is None
    assert len(run.kinds("node_returned")) == 1
    hosts = [plan["to"]["devices"][0]["hosts"] for plan in run.kinds("replanned")]
    assert difference(replayed(made, samples, network, run), run.weights()) < RTOL
    if nodes == 2:
        assert hosts == [["device", "n2", "device"], ["device", "n1", "device"]]
    made, samples = setting(tmp_path / "kept", "mpsl", nodes=nodes)
    made.run.rounds = rounds
    assert difference(run.weights(), conducted(made, samples, network).weights()) < RTOL


@pytest.mark.soak
def test_the_process_of_a_node_is_killed_and_the_run_goes_on(tmp_path):
    made = Config(name="killed", method="accept")
    made.run.dir, made.run.trace, made.model.name = str(tmp_path), "none", "mlp"
    made.data.train_samples, made.data.batch_size, made.data.test_samples = 60, 30, 20
    made.devices.count, made.nodes.count, made.pipeline.cuts = 1, 2, "1,2"
    made.nodes.replicate_every, made.run.rounds = 1, 60  # many: the kill comes when it comes
    made.network.deadline_s = 30.0
    events = []

    def follow(event):
        events.append(event)
        if event["event"] == "nodes_copied" and event["round"] == 0:
            (node,) = (
                child
                for child in psutil.Process().children()
                if "--name=n2" in child.cmdline() and str(tmp_path) in " ".join(child.cmdline())
            )
            node.kill()

    summary = launch(made, on_event=follow)
    assert summary["event"] == "run_finished" and summary["lost_hosts"] == ["n2"]
    (change,) = (event for event in events if event["event"] == "replanned")
    assert change["to"]["devices"][0]["hosts"] == ["device", "n1"]


def test_a_planned_chain_is_planned_again(tmp_path, monkeypatch, network):
    made, samples = setting(tmp_path, "mpsl", nodes=2)
    made.pipeline.cuts, made.tuner.sizes = "", "2,7"
    used = []

    def end(run):
        plan = run.kinds("run_started")[0]["plan"]
        used.append(next(node for node in (1, 2) if f"|n{node}" in plan))
        run.end_node(used[0])

    run = conducted(made, samples, network, when("nodes_copied", 0, end))
    assert run.error is None
    (change,) = run.kinds("replanned")
    hosts = {host for one in change["to"]["devices"] for host in one["hosts"]}
    assert hosts == {"device", f"n{3 - used[0]}"}
    first = run.script()[0]["nodes"]["plan"]
    assert {host for one in first["devices"] for host in one["hosts"]} >= {f"n{used[0]}"}
    # A replay finds the plan in the script: measured again it might be another one.
    with monkeypatch.context() as patched:
        patched.setattr(first_plan, "choose_plan", lambda *_: pytest.fail("it was searched for"))
        assert difference(replayed(made, samples, network, run), run.weights()) < RTOL


def test_a_node_that_is_lost_while_hosts_compile_is_left_out(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl")
    ended = []

    def follow(run, event):
        if event["event"] == "working" and event["host"] == "n2" and not ended:
            ended.append(True)
            run.end_node(2)

    run = conducted(made, samples, network, follow)
    assert run.error is None
    (change,) = run.kinds("nodes_replaced")
    assert (change["round"], change["nodes"]) == (0, ["n2"])
    assert difference(run.weights(), undisturbed("mpsl", "copy")) < RTOL


def test_a_node_that_is_lost_while_hosts_are_timed_is_left_out_of_the_plan(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl", nodes=2)
    made.pipeline.cuts, made.tuner.sizes = "", "2,7"
    ended = []

    def follow(run, event):
        if event["event"] == "working" and event["host"] == "n2" and not ended:
            assert event["what"] == "timing"
            ended.append(True)
            run.end_node(2)

    run = conducted(made, samples, network, follow)
    assert run.error is None and [event["node"] for event in run.kinds("node_lost")] == [2]
    assert not run.kinds("replanned") and "|n1" in run.kinds("run_started")[0]["plan"]
    assert difference(run.weights(), undisturbed("mpsl", "copy")) < RTOL


@pytest.mark.parametrize("node", [1, 2])
def test_a_node_that_is_lost_while_neighbours_meet_is_left_out(
    tmp_path, monkeypatch, network, node
):
    """Those that it would have connected to, and those that connect to it, do not wait for it."""
    made, samples = setting(tmp_path, "mpsl")
    connect = PeerLinks.connect

    def fail(self, number, boundaries, addresses, anew=()):
        if self.link_table.host == f"n{node}":
            raise RunError("it fails before it meets anybody")
        connect(self, number, boundaries, addresses, anew)

    monkeypatch.setattr(PeerLinks, "connect", fail)
    run = conducted(made, samples, network)
    assert run.error is None and [event["node"] for event in run.kinds("node_lost")] == [node]
    (change,) = run.kinds("nodes_replaced")
    assert (change["round"], change["nodes"]) == (0, [f"n{node}"])
    assert difference(run.weights(), undisturbed("mpsl", "copy")) < RTOL


def test_a_spare_node_may_go_without_a_trace(tmp_path, network):
    made, samples = setting(tmp_path, "mpsl")
    first = when("nodes_copied", 0, lambda run: run.end_node(1))
    back = when("nodes_replaced", 1, lambda run: run.start_node(1))
    gone = when("node_returned", None, lambda run: run.end_node(1))
    made.run.rounds = 6
    run = conducted(made, samples, network, together(first, back, gone))
    assert run.error is None
    assert len(run.kinds("nodes_replaced")) == len(run.kinds("replanned")) == 1
    assert run.kinds("run_finished")[0]["undone"] <= 1


@pytest.mark.parametrize("way", ["copy", pytest.param("shared", marks=pytest.mark.soak)])
def test_a_node_that_is_lost_while_a_device_gets_the_weights_of_the_moment_is_left_out(
    tmp_path, monkeypatch, network, way
):
    """The nodes of a round are those that are there when it is released, not when it is planned."""
    made, samples = setting(tmp_path, "mpsl", way, quorum=1, wait_s=30.0)
    points, nodes_lost = Points(monkeypatch), []

    def follow(run, event):
        if event["event"] == "device_lost":
            run.start(event["device"])

    run = OpenRun(made, samples, follow, network)

    def end_node():
        nodes_lost.append(2)
        run.end_node(2)

    points.once("count", "server", 0, lambda: run.end(1))
    points.once("count", "server", 1, lambda: time.sleep(1.5))  # so that the device is back
    points.once("before PushedState", "d1", -1, end_node)
    run.run(range(len(samples)))
    assert run.error is None, run.error
    if nodes_lost:  # the device had come back in time
        assert [one["node"] for one in run.kinds("node_lost")] == [2]
    assert {one["device"] for one in run.kinds("device_lost")} == {1}  # nobody else was waited for
