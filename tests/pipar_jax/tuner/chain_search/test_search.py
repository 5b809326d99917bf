"""The chain planner against every possible chain, the published golden values and its limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.errors import DataError, PlanError
from pipar_jax.tuner.chain_search import (
    ChainPlan,
    ChainProblem,
    Coding,
    DataOwner,
    Layer,
    Node,
    Objective,
    evaluate,
    plan_chain,
    read_profile,
)
from pipar_jax.tuner.chain_search.costs import ChainCosts
from tests.conftest import Within

PROFILES = Path(__file__).parents[5] / "shared" / "data" / "profiles"
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

SMALL = tuple(
    Layer(forward / 1e3, backward / 1e3, activation * 1e3, weight * 1e3)
    for forward, backward, activation, weight in [
        (4, 9, 64, 1), (7, 12, 64, 4), (3, 3, 32, 0), (8, 20, 32, 9), (6, 13, 16, 18),
        (1, 2, 16, 0), (9, 22, 8, 40), (5, 30, 4, 80), (2, 4, 1, 2),
    ]
)  # fmt: skip


def every_chain(problem: ChainProblem, objective: Objective) -> ChainPlan:
    """Return the best of all orders, subsets and cuts that fit into memory."""
    best: ChainPlan | None = None
    nodes = range(len(problem.nodes))
    positions = range(problem.first + 1, problem.stop)
    for count in range(1, len(problem.nodes) + 1):
        orders = itertools.permutations(nodes, count)
        for order in orders if problem.any_order else itertools.combinations(nodes, count):
            for cuts in itertools.combinations(positions, count - 1):
                plan = evaluate(problem, objective, order, cuts)
                fits = all(
                    stage.memory_bytes <= problem.nodes[node].memory_bytes
                    for stage, node in zip(plan.stages, order, strict=True)
                )
                if fits and (best is None or plan.cost_s < best.cost_s):
                    best = plan
    if best is None:
        raise PlanError("nothing fits")
    return best


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("any_order", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_plan_is_the_best_of_all_chains(
    objective: Objective, any_order: bool, shared: bool
) -> None:
    nodes = (
        Node("a", SMALL, 1.0, 0.9e6, LinkModel(2e7, 0.001, 0.0005)),
        Node("b", SMALL, 2.5, 0.7e6, LinkModel(1e7, 0.002)),
        Node("c", tuple(layer._replace(forward_s=0.006) for layer in SMALL), 1.5, 1.4e6),
    )
    owner = DataOwner(SMALL, LinkModel(1e6, 0.01), LinkModel(2e6, 0.01), 0.2)
    problem = ChainProblem(
        nodes, 1, 8, owners=3, owner=owner, micro_batches=4, shared=shared, in_flight=2,
        any_order=any_order,
        activation_codings=(Coding("few", 0.25, 1e-9),),
        cotangent_codings=(Coding("many", 0.5, 1e-9),),
    )  # fmt: skip
    plan = plan_chain(problem, objective)
    assert plan.cost_s == pytest.approx(every_chain(problem, objective).cost_s, rel=1e-12)


RAW, FEW, MANY = Coding(), Coding("few", 0.2, 2e-8), Coding("many", 0.5, 1e-8)


def least_over_codecs(
    problem: ChainProblem, objective: Objective, order: tuple[int, ...], cuts: tuple[int, ...]
) -> float:
    """Return a chain's cost with the best codecs of all that its boundaries may have together."""
    ends = (None, *order, None)
    bounds = (problem.first, *cuts, problem.stop)
    pairs = list(itertools.product(problem.activation_codings, problem.cotangent_codings))
    alone = [
        ChainCosts(
            dataclasses.replace(
                problem, activation_codings=(there,), cotangent_codings=(back,)
            ),
            objective,
        )
        for there, back in pairs
    ]  # fmt: skip
    found = []
    for chosen in itertools.product(alone, repeat=len(ends) - 1):
        value = alone[0].start
        for boundary, costs in enumerate(chosen):
            one, other = ends[boundary : boundary + 2]
            (hop,) = costs.hops(one, other, bounds[boundary])
            work = (0.0, 0.0)
            if other is not None:
                work = costs.compute(other, bounds[boundary], bounds[boundary + 1])
            value = costs.extend(value, hop, *work)
        found.append(alone[0].total(value))
    return min(found)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("owners", [1, 4])
def test_every_boundary_has_the_codecs_that_are_the_best_together(
    objective: Objective, owners: int
) -> None:
    """Cheap links whose codec costs more than it saves beside dear ones, in all combinations."""
    nodes = (
        Node("a", SMALL, 1.0, up=LinkModel(3e6, 0.001, 0.0005)),
        Node("b", SMALL, 2.5, up=LinkModel(2e8, 0.002)),
        Node("c", SMALL, 1.5, up=LinkModel(4e7, 0.004)),
    )
    owner = DataOwner(SMALL, LinkModel(4e6, 0.01), LinkModel(1e8, 0.01), 0.2)
    problem = ChainProblem(
        nodes, 1, 8, owners, owner,
        activation_codings=(RAW, FEW, MANY), cotangent_codings=(RAW, MANY),
    )  # fmt: skip
    for order, cuts in (((0, 1), (4,)), ((1, 2), (3,)), ((2,), ()), ((2, 0), (6,))):
        plan = evaluate(problem, objective, order, cuts)
        least_s = least_over_codecs(problem, objective, order, cuts)
        assert plan.cost_s == pytest.approx(least_s, rel=1e-12)
        assert len(plan.pairs) == len(order) + 1
    plan = plan_chain(problem, objective)
    assert plan.cost_s == pytest.approx(every_chain(problem, objective).cost_s, rel=1e-12)


def test_a_codec_is_used_where_its_link_is_slow() -> None:
    nodes = (Node("a", SMALL), Node("b", SMALL))
    owner = DataOwner(SMALL, LinkModel(1e6), LinkModel(1e6))
    both = (RAW, FEW)
    for objective in OBJECTIVES:
        problem = ChainProblem(nodes, 1, 8, 1, owner, activation_codings=both,
                               cotangent_codings=both)  # fmt: skip
        first, second, last = evaluate(problem, objective, (0, 1), (4,)).pairs
        assert first == last == (FEW, FEW)
        assert second == (RAW, RAW)


times = st.integers(0, 30).map(lambda ms: ms / 1e3)
sizes = st.integers(0, 9).map(float)
tables = st.lists(st.builds(Layer, times, times, sizes, sizes), min_size=3, max_size=6)


@st.composite
def problems(draw: st.DrawFn) -> ChainProblem:
    layers = tuple(draw(tables))
    caps = st.one_of(st.just(math.inf), st.floats(5, 200))
    ports = st.builds(LinkModel, st.one_of(st.none(), st.floats(100, 1e4)), st.just(0.001))
    node = st.builds(
        Node, st.just("n"), st.just(layers), st.sampled_from([1.0, 2.0, 3.7]), caps, ports, ports
    )
    nodes = tuple(draw(st.lists(node, min_size=1, max_size=3)))
    owner = draw(st.one_of(st.none(), st.builds(DataOwner, st.just(layers), ports, ports)))
    ways = st.sampled_from([(Coding(),), (Coding(), Coding("few", 0.2, 0.001))])
    stop = len(layers) - draw(st.integers(0, 1))  # the owner has the last layer, or has not
    return ChainProblem(nodes, 1, stop, owners=draw(st.integers(1, 4)), owner=owner,
                        shared=draw(st.booleans()), any_order=draw(st.booleans()),
                        activation_codings=draw(ways), cotangent_codings=draw(ways))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.sampled_from(OBJECTIVES))
def test_random_problems_match_the_best_of_all_chains(
    problem: ChainProblem, objective: Objective
) -> None:
    try:
        expected = every_chain(problem, objective)
    except PlanError:
        with pytest.raises(PlanError, match="MB"):
            plan_chain(problem, objective)
        return
    cost_s = plan_chain(problem, objective).cost_s
    assert cost_s == pytest.approx(expected.cost_s, abs=1e-12)
    assert plan_chain(problem, objective, cost_s * 1.001 + 1e-9).cost_s == cost_s
    if cost_s > 0:
        with pytest.raises(PlanError, match="or less by objective"):
            plan_chain(problem, objective, cost_s * 0.999)


@pytest.mark.parametrize(
    ("table", "layers", "count", "cost_ms", "forward_ms", "backward_ms", "cuts"),
    [
        ("resnet101", (2, 36), 2, 1036.923, 189.385, 847.538, (25,)),
        ("resnet101", (2, 36), 3, 711.461, 127.461, 584.000, (18, 31)),
        ("vgg19", (3, 22), 5, 747.482, 157.828, 589.654, None),
    ],
)
def test_published_optima_are_reproduced(
    table: str,
    layers: tuple[int, int],
    count: int,
    cost_ms: float,
    forward_ms: float,
    backward_ms: float,
    cuts: tuple[int, ...] | None,
    within: Within,
) -> None:
    path = PROFILES / f"{table}_cifar.csv"
    if not path.exists():
        pytest.skip("the profile tables are not on this machine")
    profile = read_profile(path, "VM")
    problem = ChainProblem(tuple(Node(f"n{i}", profile) for i in range(count)), *layers)
    with within(0.1, time.process_time):
        plan = plan_chain(problem, "mpsl")
    # The published figures are rounded sums of rounded terms.
    assert plan.cost_s * 1e3 == pytest.approx(cost_ms, abs=0.0011)
    assert max(s.forward_s for s in plan.stages) * 1e3 == pytest.approx(forward_ms, abs=0.0011)
    assert max(s.backward_s for s in plan.stages) * 1e3 == pytest.approx(backward_ms, abs=0.0011)
    if cuts is not None:
        assert plan.cuts == cuts


def test_the_owners_cycle_by_hand() -> None:
    layers = tuple(Layer(1.0, 2.0, 8.0, 0.0) for _ in range(4))
    owner = DataOwner(layers, LinkModel(4.0, 0.5), LinkModel(2.0, 0.25), speed=0.5)
    problem = ChainProblem(
        (Node("a", layers, up=LinkModel(8.0), down=LinkModel(4.0)), Node("b", layers)), 1, 3,
        owners=2, owner=owner, micro_batches=5,
    )  # fmt: skip
    plan = evaluate(problem, "steady", (0, 1), (2,))
    # Own layers 2 x 3 / 0.5; activations up 2.5 and down 4.25, cotangents up and down as well;
    # a to b 1 there and 2 back; 6 on the nodes.
    assert plan.cycle_s == pytest.approx(12 + 2 * (2.5 + 4.25) + 3 + 6)
    assert plan.cost_s == pytest.approx(plan.cycle_s / 2)
    # A tenth of the step is one micro-batch's cycle, the rest goes at the pace of the owners' own
    # layers, half of whose 12 s every batch waits for.
    step_s = evaluate(problem, "step", (0, 1), (2,)).cost_s
    assert step_s == pytest.approx(plan.cycle_s / 10 + 0.9 * 6)
    many = evaluate(ChainProblem(problem.nodes, 1, 3, owners=100, owner=owner), "steady", (0, 1),
                    (2,))  # fmt: skip
    assert many.cost_s == pytest.approx(3.0)  # no longer the cycle, but a node
    assert evaluate(problem, "mpsl", (0, 1), (2,)).cost_s == pytest.approx(3.0)


def test_nothing_returns_from_a_chain_that_ends_the_model() -> None:
    nodes = (Node("a", SMALL), Node("b", SMALL))
    owner = DataOwner(SMALL, LinkModel(1e5), LinkModel(2e5))
    problem = ChainProblem(nodes, 1, len(SMALL), owner=owner)
    plan = evaluate(problem, "steady", (0, 1), (4,))
    # The owner's layer 4 + 9 ms; its activation up 0.64 s, the cotangent down 0.32 s.
    on_nodes_s = sum(one.forward_s + one.backward_s for one in SMALL[1:])
    assert plan.cycle_s == pytest.approx(0.013 + 0.64 + 0.32 + on_nodes_s)


def test_memory_follows_the_policy_of_the_weights() -> None:
    problem = ChainProblem((Node("a", SMALL),), 1, 8, owners=10)
    assert problem.memory_bytes(5.0, 7.0) == 10 * (15 + 7)
    shared = ChainProblem((Node("a", SMALL),), 1, 8, owners=10, shared=True)
    assert shared.memory_bytes(5.0, 7.0) == 15 + 70
    capped = ChainProblem((Node("a", SMALL),), 1, 8, owners=10, shared=True, in_flight=3)
    assert capped.memory_bytes(5.0, 7.0) == 15 + 21


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    problem = ChainProblem((Node("a", SMALL, memory_bytes=1e5),) * 2, 1, 9, owners=4)
    with pytest.raises(PlanError, match=r"4 owners need .* MB in all .* 0\.1, 0\.1 MB"):
        plan_chain(problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": ()}, "at least one node"),
        ({"stop": 12}, "1:12"),
        ({"first": 0, "owner": DataOwner(SMALL)}, "at least the first layer"),
        ({"nodes": (Node("a", SMALL), Node("b", SMALL[1:]))}, "different numbers"),
        ({"owners": 0}, "owners=0"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"nodes": (Node("a", SMALL, speed=0.0),)}, "speeds"),
        ({"activation_codings": (Coding("odd", -1.0),)}, "codec odd of activations: ratio -1"),
        ({"cotangent_codings": ()}, "cotangents need at least one coding"),
    ],
)
def test_malformed_problems_are_refused(change: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"nodes": (Node("a", SMALL),), "first": 1, "stop": 9}
    with pytest.raises(PlanError, match=message):
        ChainProblem(**{**values, **change})  # type: ignore[arg-type]


def test_wrong_cuts_and_objectives_are_refused() -> None:
    problem = ChainProblem((Node("a", SMALL), Node("b", SMALL)), 1, 9)
    with pytest.raises(PlanError, match="one fewer than nodes"):
        evaluate(problem, "mpsl", (0, 1), (3, 4))
    with pytest.raises(PlanError, match="increasing"):
        evaluate(problem, "mpsl", (0, 1), (9,))
    with pytest.raises(PlanError, match="mpsl, steady, accept, step"):
        plan_chain(problem, "fastest")  # type: ignore[arg-type]


def test_broken_tables_are_refused(tmp_path: Path) -> None:
    head = "device,layer,forward_ms,backward_ms,update_ms,activation_kb,weight_kb\n"
    path = tmp_path / "table.csv"
    path.write_text(head + "a,1,3,4,1,2,1\na,0,1,2,0.5,4,0.5\n")
    assert read_profile(path, "a") == (
        Layer(0.001, 0.0025, 4096.0, 512.0), Layer(0.003, 0.005, 2048.0, 1024.0),
    )  # fmt: skip
    with pytest.raises(DataError, match="no device 'b': it has a"):
        read_profile(path, "b")
    path.write_text(head + "a,0,1,2,0,4,1\na,2,1,2,0,4,1\n")
    with pytest.raises(DataError, match="without a gap"):
        read_profile(path, "a")
    path.write_text(head + "a,0,fast,2,0,4,1\n")
    with pytest.raises(DataError, match="not a profile table"):
        read_profile(path, "a")
    with pytest.raises(DataError, match="not a profile table"):
        read_profile(tmp_path / "missing.csv", "a")
