"""A chain whose plan changes during a run trains the weights that it would have trained anyhow."""

from __future__ import annotations

import functools

import jax
import pytest

from pipar_jax.config import TunerConfig
from pipar_jax.errors import PlanError, RunError
from pipar_jax.launch import api
from pipar_jax.runtime import moves
from pipar_jax.schedule.plan import OWNER, DevicePlan, Plan
from tests.pipar_jax.runtime import support

RTOL = 1e-9
STEPS = 5
ONE, EVEN, RAGGED = (35,), (35, 35), (13, 34)


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    yield support.chain()
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def scripted(monkeypatch):
    """Lets runs follow plans given in advance: a function from plans."""

    real = api.run_server

    def install(*plans: Plan) -> None:
        monkeypatch.setattr(api, "run_server", functools.partial(real, script=plans))

    return install


def chain(cuts, nodes, *, devices=1, home=False, n=3, **values) -> Plan:
    hosts = (OWNER, *(f"n{node}" for node in nodes), *((OWNER,) if home else ()))
    values = {"aggregate_every": 1} | values
    return Plan((DevicePlan(cuts, hosts, n),) * devices, **values)


def setting(folder, samples, plan: Plan, nodes: int):
    """A run that begins with a plan over all nodes in order."""
    made = support.config(folder, samples, method="accept" if len(samples) == 1 else "mpsl")
    made.nodes.count, made.pipeline.micro_batches = nodes, 3
    made.pipeline.cuts = ",".join(map(str, plan.devices[0].cuts))
    made.pipeline.weights, made.pipeline.in_flight = str(plan.weights), plan.in_flight
    made.pipeline.labels = "home" if plan.devices[0].hosts[-1] == OWNER else "end"
    made.aggregation.every = f"{plan.aggregate_every} steps"
    made.optimizer.momentum = 0.9
    return made


def kept(folder, scripted, made, samples, network):
    """Returns what a run trains whose plan stays."""
    made.run.dir = str(folder / "kept")
    scripted()
    return support.trained(made, samples, network)


def changed(folder, scripted, made, samples, network, plans):
    """Returns what a run trains under the plans, one for each round, and its events."""
    events = []
    made.run.dir = str(folder / "changed")
    scripted(*plans)
    run = support.trained(made, samples, network, events)
    assert [Plan.from_dict(e["to"]) for e in events if e["event"] == "replanned"] == list(plans[1:])
    return run, events


def test_a_chain_of_peers_is_cut_anew_and_put_in_another_order(double, network, scripted, tmp_path):
    plans = [
        chain((1, 2, 3), (1, 2, 3)),
        chain((2, 3, 5), (1, 2, 3)),
        chain((1, 4), (3, 1)),  # n2 is left out
        chain((1, 3, 4), (2, 3, 1)),
        chain((2,), (1,)),
    ]
    made = setting(tmp_path, ONE, plans[0], 3)
    run, events = changed(tmp_path, scripted, made, ONE, network, plans)
    (loader,) = support.batches(made, ONE)
    batches = [[loader.batch(step)] for step in range(STEPS)]
    expected = support.centralised(made, network, batches)
    assert support.largest_difference(run.params, expected) < RTOL
    # Links to neighbours that met during the run are on the books from then on.
    rounds = [event["links"] for event in events if event["event"] == "round_finished"]
    messages = [
        {(row["source"], row["target"]): row["messages"] for row in rows} for rows in rounds
    ]
    assert ("n3", "n1") not in messages[1]
    assert messages[2]["n3", "n1"] > 0
    assert messages[4]["n3", "n1"] == 0


def test_momentum_of_devices_and_of_the_average_moves_with_units(
    double, network, scripted, tmp_path
):
    """Averaged every other step over unequal shards, devices' momenta differ: none may be lost."""
    made_chain = functools.partial(chain, devices=2, home=True, aggregate_every=2)
    plans = [
        made_chain((1, 3, 5), (1, 2)),
        made_chain((2, 3, 4), (2, 1)),
        made_chain((1, 4), (2,)),
    ]
    made = setting(tmp_path, RAGGED, plans[0], 2)
    made.aggregation.rule, made.aggregation.learning_rate = "fedavgm", 0.5
    made.aggregation.proximal_mu = 0.1
    run, _ = changed(tmp_path, scripted, made, RAGGED, network, plans)
    plain = kept(tmp_path, scripted, made, RAGGED, network)
    assert support.largest_difference(run.params, plain.params) < RTOL


def test_a_node_is_left_out_and_taken_back_while_labels_stay_home(
    double, network, scripted, tmp_path
):
    plans = [
        chain((1, 3, 5), (1, 2), devices=2, home=True),
        chain((2, 4), (2,), devices=2, home=True),
        chain((1, 2, 5), (2, 1), devices=2, home=True),
        chain((1, 3, 5), (1, 2), devices=2, home=True),
    ]
    made = setting(tmp_path, EVEN, plans[0], 2)
    run, _ = changed(tmp_path, scripted, made, EVEN, network, plans)
    loaders = support.batches(made, EVEN)
    union = [[loader.batch(step) for loader in loaders] for step in range(STEPS)]
    expected = support.centralised(made, network, union)
    assert support.largest_difference(run.params, expected) < RTOL


def test_the_one_copy_that_devices_share_moves_between_nodes(double, network, scripted, tmp_path):
    made_chain = functools.partial(
        chain, devices=2, home=True, weights="shared", in_flight=2, aggregate_every=2
    )
    plans = [made_chain((1, 3, 5), (1, 2)), made_chain((1, 2, 5), (2, 1)), made_chain((1, 5), (1,))]
    made = setting(tmp_path, RAGGED, plans[0], 2)
    run, _ = changed(tmp_path, scripted, made, RAGGED, network, plans)
    plain = kept(tmp_path, scripted, made, RAGGED, network)
    assert support.largest_difference(run.params, plain.params) < RTOL


def test_what_devices_share_does_not_become_their_own():
    shared = functools.partial(chain, devices=2, home=True, weights="shared")
    old, new = shared((1, 3, 5), (1, 2)), shared((2, 3, 5), (1, 2))
    with pytest.raises(PlanError, match="units 1 would no longer be each device's own, or shared"):
        moves.check_follows(old, new, 6)
    moves.check_follows(old, shared((1, 2, 5), (2, 1)), 6)
    with pytest.raises(PlanError, match="weights would change from 'shared' to 'copy'"):
        moves.check_follows(old, chain((1, 3, 5), (1, 2), devices=2, home=True), 6)


def test_a_plan_that_a_node_has_no_room_for_is_refused_before_anything_moves(
    double, network, scripted, tmp_path
):
    plan = chain((3, 4), (1, 2))
    made = setting(tmp_path, ONE, plan, 2)
    made.nodes.overrides = {2: {"memory_mb": 0.0128}}
    scripted(plan, chain((1, 2), (1, 2)))
    with pytest.raises(RunError, match=r"compute node 2 needs .* MB for the plan .*1.n1.2.n2"):
        support.trained(made, ONE, network)


@pytest.mark.soak
def test_a_chain_leaves_out_a_node_behind_a_slow_link_by_itself(double, network, tmp_path):
    """Between two nodes each step waits for the link's delay twice; one node has no such link."""
    made = setting(tmp_path / "changed", ONE, chain((2, 4), (1, 2), aggregate_every=5), 2)
    made.epochs, made.nodes.defaults.link = 40, "none/100ms"
    made.tuner.adapt, made.tuner.look_s, made.tuner.sizes = True, 0.05, "2,7"
    events = []
    run = support.trained(made, ONE, network, events)
    changes = [event for event in events if event["event"] == "replanned"]
    assert changes, "no plan was found better than one that waits for a slow link"
    assert len(changes[-1]["to"]["devices"][0]["hosts"]) == 2
    assert changes[0]["to_epoch_s"] < 0.9 * changes[0]["from_epoch_s"]
    made.tuner, made.run.dir = TunerConfig(), str(tmp_path / "kept")
    made.nodes.defaults.link = "none"
    plain = support.trained(made, ONE, network)
    assert support.largest_difference(run.params, plain.params) < RTOL
