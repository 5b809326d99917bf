"""Compute nodes are lost in the midst of whole runs, which go on over those that are left.

A chain that is cut anew trains what it would have trained anyhow: with copies of each round, a loss
before the commit or between two rounds leaves the weights of the undisturbed run.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from pipar_jax.errors import PeerError
from pipar_jax.methods.registry import METHODS, node_methods
from tests.pipar_jax.roles.open_runs import OpenRun, before_batch, config
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
    """Acts once, on the first event of a kind in a round or after it."""
    done = []

    def follow(run, event):
        if event["event"] == event_name and event["round"] >= round_ and not done:
            done.append(True)
            act(run)

    return follow


def conducted(made, samples, network, follow=None):
    return OpenRun(made, samples, follow, network).run(range(len(samples)))


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[k] - other[k]).max() / np.abs(other[k]).max()) for k in one)


@functools.cache
def undisturbed(method, way):
    """Returns the weights of a run without a loss."""
    with tempfile.TemporaryDirectory() as folder:
        made, samples = setting(pathlib.Path(folder), method, way)
        return conducted(made, samples, support.chain()).weights()


@pytest.mark.parametrize("node", [1, 2, 3])
@pytest.mark.parametrize("moment", ["in a round", "between rounds"])
@pytest.mark.parametrize(("method", "way"), WAYS)
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
