"""Memory of compute nodes: what is predicted, what is booked, what jax says, and the cap."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types

import jax
import pytest

from experiments.benchmarks.node_memory import drive_alone
from pipar_jax.errors import RunError
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.registry import hosts_of, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.predictor.predict_host import facts_of
from pipar_jax.runtime import memory
from pipar_jax.runtime.memory import Ledger
from pipar_jax.schedule.plan import OWNER
from pipar_jax.training import optimizer
from pipar_jax.tuner import StageCosts, memory_bytes
from pipar_jax.tuner.bounds import kept_in
from tests.pipar_jax.runtime import support
from tests.pipar_jax.tuner import profiles

DEVICES = (16, 16)


def setting(tmp_path, nodes=2, **pipeline):
    made = support.config(tmp_path, DEVICES, method="mpsl", name="vgg5", dtype="float32", batch=8)
    made.nodes.count, made.pipeline.micro_batches = nodes, 2
    made.pipeline.cuts = ",".join(str(i + 1) for i in range(nodes + 1))
    made.optimizer.momentum = 0.9
    for name, value in pipeline.items():
        setattr(made.pipeline, name, value)
    return made


def test_a_ledger_remembers_the_most_since_it_was_asked():
    ledger = Ledger()
    ledger.hold(5)
    ledger.hold(7)
    ledger.drop(10)
    assert (ledger.now_bytes, ledger.take_peak()) == (2, 12)
    ledger.hold(1)
    assert ledger.take_peak() == 3


def test_books_agree_with_jax_and_the_prediction_with_the_books(tmp_path):
    """A process that holds one host: at rest between forwards and backwards, to the byte."""
    made = setting(tmp_path)
    units = [f"unit{i}" for i in range(5)]
    copy = plan_for(resolve(made, models=(made.model.name,)), units)
    shared = dataclasses.replace(copy, weights="shared")
    capped = dataclasses.replace(shared, in_flight=2)
    found = drive_alone(
        resolve(made, models=(made.model.name,)), (copy, shared, capped), "n1",
        input_shape=support.SHAPE, classes=support.CLASSES,
    )  # fmt: skip
    for plan, one in zip((copy, shared, capped), found, strict=True):
        # With a cap, inputs wait: their buffers are on the books, but no arrays of jax yet.
        assert one.booked == one.live or (plan is capped and one.booked > one.live)
        assert one.booked <= one.arrays <= one.predicted <= 1.25 * one.arrays
    assert found[0].arrays > found[1].arrays > found[2].arrays


def test_what_a_run_held_is_told_and_stays_within_the_prediction(tmp_path):
    events = []
    made = setting(tmp_path, weights="shared", in_flight=2)
    run = support.trained(made, DEVICES, events=events)
    (prepared,) = [event for event in run.metrics if event["event"] == "prepared"]
    rounds = [event for event in run.metrics if event["event"] == "round_finished"]
    assert rounds
    for event in rounds:
        assert set(event["memory"]) == {"server", "n1", "n2", "d0", "d1"}
        for host, used in event["memory"].items():
            held = used["arrays"] + used["temporary"]
            assert held <= prepared["memory_bytes"][host] < used["resident"]
            assert (used["arrays"] > 0) == (host != "server")


def test_a_host_that_computes_forwards_again_keeps_less(tmp_path):
    made = setting(tmp_path)
    network = support.model("vgg5", "float32")
    kept = []
    for again in (False, True):
        made.nodes.defaults.rematerialise = again
        config = resolve(made, models=(made.model.name,))
        plan = plan_for(config, network.unit_names)
        kept.append(memory.predict(network, plan, "n1", config, DEVICES).held)
    # Two devices' eight samples of the input, [4, 4, 32] float32, and nothing else.
    assert kept[1] == 2 * 8 * 4 * 4 * 32 * 4 < kept[0]


@pytest.mark.parametrize("share", [0.9, 1.01])
def test_a_plan_above_a_node_s_memory_is_refused_with_the_figures(tmp_path, share):
    """Before anything is built if its arrays are too many, else when temporaries are known."""
    made = setting(tmp_path)
    config = resolve(made, models=(made.model.name,))
    network = support.model("vgg5", "float32")
    plan = plan_for(config, network.unit_names)
    need = memory.predict(network, plan, "n2", config, DEVICES)
    limit_mb = need.arrays * share / 1e6
    made.nodes.overrides = {2: {"memory_mb": limit_mb}}
    with pytest.raises(RunError, match=r"compute node 2 needs .*copies: 2") as caught:
        support.trained(made, DEVICES)
    text = str(caught.value)
    assert f"nodes.2.memory_mb={limit_mb:g}" in text and "pipeline.weights=shared" in text
    assert ("temporaries" in text) == (share > 1)


@pytest.mark.parametrize(
    ("host", "field", "name"),
    [("d1", "devices.1", "device 1"), ("server", "server", "the server")],
)
def test_a_plan_above_any_hosts_memory_is_refused(tmp_path, host, field, name):
    made = support.config(tmp_path, DEVICES, method="pipar", name="vgg5", batch=8)
    if host == "server":
        made.server.memory_mb = 0.5
    else:
        made.devices.overrides = {1: {"memory_mb": 0.01}}
    with pytest.raises(RunError, match=f"{name} needs .* {field}.memory_mb=0.*raise the limit"):
        support.trained(made, DEVICES)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("weights", ["copy", "shared"])
def test_what_the_tuner_offers_by_a_profile_no_node_refuses(tmp_path, weights, every):
    """One model of memory with the bytes of a profile's units, or of the stages themselves."""
    made = setting(tmp_path, weights=weights)
    made.nodes.replicate_every, made.optimizer.momentum = every, 0.9
    config = resolve(made, models=(made.model.name,))
    network = support.model("vgg5", "float32")
    optimiser = optimizer.compiled(config.optimizer, steps=1)
    units = facts_of(network, optimiser.transformation, made.data.batch_size)
    count = len(units)
    base = profiles.profile(*[profiles.device(samples=DEVICES[0], units=count)] * 2, units=count)
    known = dataclasses.replace(base, units=units, batch_size=made.data.batch_size)
    known = dataclasses.replace(known, nodes=(profiles.node(units=count),) * 2)
    for cuts in itertools.combinations(range(1, count), 3):
        plan = plan_of_chain(config, cuts, (OWNER, "n1", "n2", OWNER))
        offered = memory_bytes(StageCosts(known), plan, kept_in(hosts_of(config), config.cohort))
        for node in ("n1", "n2"):
            needed = memory.predict(network, plan, node, config, DEVICES).arrays
            assert needed <= offered[node] <= 1.5 * needed
            kept = memory.predict(network, plan, node, config, DEVICES).kept
            assert (kept > 0) == (every > 0)


def test_a_board_that_may_not_bear_compiling_is_told_before_it_does(tmp_path):
    made = support.config(tmp_path, DEVICES, name="vgg5", dtype="float32", batch=8)
    made.pipeline.cut, made.run.rounds = 2, 1
    # More than training needs, less than jax and a compiler.
    made.devices.overrides = {1: {"memory_mb": 350.0}}
    network = support.model("vgg5", dtype="float32")
    events = []
    support.trained(made, DEVICES, network, events)
    (told,) = (event for event in events if event["event"] == "cold_start")
    assert told["host"] == "d1"
    assert re.search(r"device 1 may take \d+ MB .* devices\.1\.memory_mb=350", told["reason"])
    order = [event["event"] for event in events]
    assert order.index("cold_start") < order.index("prepared")


def test_what_compiling_may_take_counts_frozen_weights(tmp_path):
    network = support.model("vgg5", dtype="float32")
    made = support.config(tmp_path, DEVICES, name="vgg5", dtype="float32", batch=8)
    made.pipeline.cut, made.devices.defaults.memory_mb = 2, 1.0
    plan, found = plan_for(resolve(made, models=("vgg5",)), network.unit_names), []
    table = {"table": jax.ShapeDtypeStruct((100_000_000,), "int8")}
    first = network.units[0]
    for frozen in ({}, table):
        units = (dataclasses.replace(first, frozen=frozen), *network.units[1:])
        some = types.SimpleNamespace(units=units)
        reason = memory.cold_start_excess(some, plan, hosts_of(made), "d0")
        found.append(int(re.search(r"may take (\d+) MB", reason)[1]))
    assert found[1] - found[0] == memory.COMPILED_MB + 100
    # A device of a sampled cohort takes a place that is not its own.
    one = dataclasses.replace(plan, devices=plan.devices[:1])
    assert memory.cold_start_excess(network, one, hosts_of(made), "d1") is None  # has nothing
    made.cohort.size = 1
    assert memory.cold_start_excess(network, one, hosts_of(made), "d1") is not None


def test_what_compiling_may_take_grows_with_the_arrays_of_a_stage(tmp_path):
    network = support.model("vgg5", dtype="float32")
    made = support.config(tmp_path, DEVICES, name="vgg5", dtype="float32", batch=8)
    found = []
    for cut in (1, 2, 4):
        made.pipeline.cut, made.devices.defaults.memory_mb = cut, 1.0
        plan = plan_for(resolve(made, models=("vgg5",)), network.unit_names)
        hosts = hosts_of(made)
        reason = memory.cold_start_excess(network, plan, hosts, "d0")
        found.append(int(re.search(r"may take (\d+) MB", reason)[1]))
        assert memory.cold_start_excess(network, plan, hosts, "server") is None  # has no limit
        made.devices.defaults.memory_mb = 1e4
        assert memory.cold_start_excess(network, plan, hosts_of(made), "d0") is None
    assert memory.PROCESS_MB < found[0] < found[1] < found[2]
