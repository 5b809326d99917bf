"""Chains over compute nodes: what equals what, where labels go, what a lost node does."""

from __future__ import annotations

import dataclasses
import re
import socket

import jax
import numpy as np
import optax
import pytest

from pipar_jax.errors import ConfigError, JoinError, PlanError
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles import survey
from pipar_jax.roles.participants import run_node
from pipar_jax.roles.server import run_server
from pipar_jax.schedule.plan import OWNER, Codecs
from tests.pipar_jax.runtime import support

RTOL = 1e-9
STEPS = 5
EVEN = (35, 35)
RAGGED = (13, 34)


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    yield support.chain()
    jax.config.update("jax_enable_x64", False)


def setting(tmp_path, samples, nodes, labels="home", weights="copy", in_flight=0, n=3):
    made = support.config(tmp_path, samples, method="mpsl")
    made.nodes.count, made.pipeline.labels = nodes, labels
    cuts = nodes + (labels == "home")
    made.pipeline.cuts = ",".join(str(i + 1) for i in range(cuts))
    made.pipeline.weights, made.pipeline.in_flight = weights, in_flight
    made.pipeline.micro_batches = n
    return made


def train(made, samples, network, events=None):
    made.model.name = "mlp"  # any that is known; the network is handed over
    return support.trained(made, samples, network, events)


def union(made, samples):
    loaders = support.batches(made, samples)
    return [[loader.batch(step) for loader in loaders] for step in range(STEPS)]


CASES = [
    (1, "home", "copy", 0),
    (1, "home", "shared", 1),
    (2, "home", "shared", 2),
    (4, "home", "copy", 0),
    (1, "end", "copy", 0),
    (3, "end", "shared", 0),
]
MORE = [
    (1, "home", "shared", 0),
    (2, "home", "copy", 0),
    (3, "home", "shared", 0),
    (4, "home", "shared", 3),
    (2, "end", "shared", 1),
    (3, "end", "copy", 0),
    (4, "end", "shared", 0),
]
CASES += [pytest.param(*one, marks=pytest.mark.soak) for one in MORE]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("nodes", "labels", "weights", "in_flight"), CASES)
def test_a_chain_averaged_each_step_equals_sgd_on_the_union(
    double, network, nodes, labels, weights, in_flight, tmp_path
):
    made = setting(tmp_path, EVEN, nodes, labels, weights, in_flight)
    made.optimizer.momentum, made.optimizer.weight_decay = 0.9, 0.01
    run = train(made, EVEN, network)
    expected = support.centralised(made, network, union(made, EVEN), weight_decay=0.01)
    assert support.largest_difference(run.params, expected) < RTOL


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weights", ["copy", "shared"])
def test_ragged_batches_and_changing_shares_do_not_matter_to_plain_sgd(
    double, network, weights, tmp_path
):
    made = setting(tmp_path, RAGGED, 2, "home", weights)
    run = train(made, RAGGED, network)
    expected = support.centralised(made, network, union(made, RAGGED))
    assert support.largest_difference(run.params, expected) < RTOL


def test_clipping_looks_at_the_gradient_that_all_devices_sum_up(double, network, tmp_path):
    """One step: what the node updates is all that the devices' own clipping leaves alone."""
    samples = (7, 5)
    made = setting(tmp_path, samples, 1, "home", "shared")
    made.optimizer.clip_norm, made.pipeline.cuts = 0.01, "1,3"
    run = train(made, samples, network)
    loaders = support.batches(made, samples)
    tx = optax.chain(support.clip(0.01, (0, 1, 3, 6)), optax.sgd(made.optimizer.learning_rate))
    step = [[loader.batch(0) for loader in loaders]]
    expected = support.centralised(made, network, step, tx)
    middle = {unit: expected[unit] for unit in ("fc2", "fc3")}
    assert support.largest_difference(run.params, middle) < RTOL
    free = support.centralised(made, network, step)
    assert support.largest_difference(run.params, {unit: free[unit] for unit in middle}) > 1e-4


def test_a_chain_of_peers_trains_one_device(double, network, tmp_path):
    """AccEPT's chain: a device and three peers, the labels travel to the last."""
    made = setting(tmp_path, (35,), 3, "end")
    made.method, made.optimizer.momentum = "accept", 0.9
    run = train(made, (35,), network)
    expected = support.centralised(made, network, union(made, (35,)))
    assert support.largest_difference(run.params, expected) < RTOL


@pytest.mark.parametrize("weights", ["copy", "shared"])
def test_copies_are_averaged_once_an_epoch_where_they_live(double, network, weights, tmp_path):
    """Two epochs of several steps each: nothing of the middle travels but to be evaluated."""
    made = setting(tmp_path, EVEN, 2, "home", weights)
    made.aggregation.every, made.epochs, made.run.evaluate_every = "epoch", 2, 2
    events = []
    run = train(made, EVEN, network, events)
    (evaluated,) = [event for event in events if event["event"] == "evaluated"]
    middle = sum(a.nbytes for unit in ("fc2", "fc3") for a in run.params[unit].values())
    assert middle <= evaluated["fetched_bytes"] < middle + 4096
    assert evaluated["fetch_s"] > 0
    assert set(events[-1]["idle"]) == {"server", "n1", "n2", "d0", "d1"}
    averages = [row for _, row in run.trace().rows() if row.action.kind == "A"]
    assert len(averages) == 2 * 3  # each round: both nodes and the coordinator


def test_shared_weights_take_one_step_for_all_so_epochs_must_be_equal(network, tmp_path):
    made = setting(tmp_path, RAGGED, 2, "home", "shared")
    made.aggregation.every = "epoch"
    with pytest.raises(PlanError, match=r"the devices' epochs have 2, 5 steps.*aggregation.every"):
        train(made, RAGGED, network)


@pytest.mark.parametrize("labels", ["home", "end"])
def test_no_label_leaves_home_unless_told_to(double, network, labels, tmp_path, monkeypatch):
    """All bytes of all connections, searched for the labels of any micro-batch."""
    sent = []
    sendmsg = socket.socket.sendmsg

    def spying(self, buffers, *args):
        buffers = [bytes(one) for one in buffers]
        count = sendmsg(self, buffers, *args)
        sent.append(b"".join(buffers)[:count])
        return count

    monkeypatch.setattr(socket.socket, "sendmsg", spying)
    made = setting(tmp_path, EVEN, 2, labels, n=1)
    train(made, EVEN, network)
    wire = b"".join(sent)
    batches = [batch.targets["y"] for step in union(made, EVEN) for batch in step]
    found = [one for one in batches if one.astype(np.int32).tobytes() in wire]
    assert len(found) == (0 if labels == "home" else len(batches))


def test_each_boundary_has_codecs_of_its_own(double, network, tmp_path, monkeypatch):
    """What a link's account says is what was planned, and the weights are off by no more bits."""
    codecs = (Codecs("bits:11", "raw"), Codecs(), Codecs("int8", "bits:15"))
    start, _ = network.init(0)

    def run(pairs, name):
        monkeypatch.setitem(
            METHODS, "accept", dataclasses.replace(
                METHODS["accept"], plan=lambda config, units: plan_of_chain(
                    config, (1, 2, 3), (OWNER, "n1", "n2", "n3"), pairs
                ),
            ),
        )  # fmt: skip
        made = setting(tmp_path / name, (35,), 3, "end")
        made.method, made.pipeline.micro_batches, events = "accept", 2, []
        params = train(made, (35,), network, events).params
        rows = [row for event in events for row in event.get("links", ())]
        sizes = {(row["source"], row["target"]): (0, 0) for row in rows}
        for row in rows:
            raw, coded = sizes[row["source"], row["target"]]
            sizes[row["source"], row["target"]] = (
                raw + row["raw_bytes"], coded + row["payload_bytes"]
            )  # fmt: skip
        return params, {ends: coded / raw for ends, (raw, coded) in sizes.items() if raw}

    raw, _ = run((), "raw")
    coded, ratio = run(codecs, "coded")
    for ends in (("d0", "n1"), ("n2", "n3"), ("n3", "n2")):
        assert ratio[ends] < 0.7
    for ends in (("n1", "d0"), ("n1", "n2"), ("n2", "n1")):
        assert ratio[ends] == 1.0
    # An element is off by at most 2^-K of the largest near it, or for int8 by half of 1/127.
    moved, off = distance(raw, start), distance(coded, raw)
    assert 1e-6 * moved < off < (2**-11 + 2**-15 + 1 / 254) * moved


def distance(one, other):
    return sum(
        float(np.square(np.asarray(array) - np.asarray(other[unit][path])).sum())
        for unit, arrays in one.items()
        for path, array in arrays.items()
    ) ** 0.5  # fmt: skip


@pytest.mark.soak  # it measures hosts twice
def test_the_planner_gives_a_slow_link_a_codec_and_a_fast_one_none(network, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "FIRST_BYTES", 4096)  # enough to time a link as slow as this
    made = setting(tmp_path, (35,), 2, "end")
    made.method, made.pipeline.cuts, made.aggregation.every = "accept", "", "epoch"
    made.tuner.sizes, made.tuner.cache, made.tuner.codecs = "3,7", False, "auto"
    made.devices.defaults.link = "0.2/0.2"
    events = []
    train(made, (35,), network, events)
    (plan,) = [event["plan"] for event in events if event["event"] == "tuned"]
    assert re.match(r"device\|\d:bits:\d+/bits:\d+\|n\d(\|\d\|n\d)? x3", plan), plan


@pytest.mark.soak  # as `test_a_planned_chain_is_planned_again`
def test_the_planner_cuts_the_chain_if_nobody_else_does(network, tmp_path):
    made = setting(tmp_path, EVEN, 2)
    made.pipeline.cuts, made.nodes.overrides = "", {1: {"slowdown": 20.0}}
    made.tuner.sizes, made.tuner.cache = "3,7", False
    events = []
    train(made, EVEN, network, events)
    (tuned,) = [event for event in events if event["event"] == "tuned"]
    assert len(tuned["profile"]["nodes"]) == 2
    assert tuned["plan"].startswith("2 of device|") and tuned["plan"].count("|n") >= 1
    assert tuned["epoch_s"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "nodes.count=0"),
        ({"method": "pipar", "cuts": "1,2"}, "use pipeline.cut"),
        ({"method": "accept"}, "devices.count=2"),
        ({"cuts": "1,2"}, "has 2 cuts, but the chain device | n1 | n2 | device"),
        ({"cuts": "2,1,3"}, "must rise"),
        ({"in_flight": 2}, "pipeline.weights=shared"),
        ({"overrides": {3: {"slowdown": 2.0}}}, "use 1 to 2"),
        ({"overrides": {1: {"slow": 2.0}}}, "nodes.1.slow is not a field"),
        ({"overrides": {1: {"host": "0.0.0.0"}}}, "network.token is not set"),
    ],
)
def test_a_chain_that_cannot_work_is_refused_by_name_of_the_field(change, message, tmp_path):
    made = setting(tmp_path, EVEN, change.get("nodes", 2))
    made.method = change.get("method", "mpsl")
    made.pipeline.cuts = change.get("cuts", made.pipeline.cuts)
    made.pipeline.in_flight = change.get("in_flight", 0)
    made.nodes.overrides = change.get("overrides", {})
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_for(resolve(made, models=(made.model.name,)), [f"fc{i}" for i in range(6)])


def test_a_node_that_cannot_reach_the_server_says_so(tmp_path):
    made = setting(tmp_path, EVEN, 1)
    made.network.join_timeout_s = 0.5
    with pytest.raises(JoinError, match="compute node 1 cannot join"):
        run_node(resolve(made, models=(made.model.name,)), 1, ("127.0.0.1", 9))


def test_a_node_that_does_not_come_is_named(network, tmp_path):
    made = setting(tmp_path, EVEN, 2)
    made.network.join_timeout_s = 1.0
    data = support.datasets(EVEN)
    with pytest.raises(JoinError, match=r"n1, n2, d0, d1 of 4 hosts did not join within 1 s"):
        run_server(
            resolve(made, models=(made.model.name,)),
            on_event=lambda _: None,
            model=network,
            data=data[-1],
        )
