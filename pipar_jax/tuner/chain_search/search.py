"""The exact search for a chain: dynamic programming over Pareto fronts, within a widening bound.

A state is (layers placed, nodes used, last node); it keeps the Pareto front of the objective's two
dimensions, since either may be decisive. Codecs are part of the search: all codings on the Pareto
front of a boundary's costs are tried. States whose bound exceeds a limit are dropped; the limit
starts close to the bound of the empty chain and is raised until a chain lies within it. That chain
is the optimum, because nothing cheaper than the limit was dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipar_jax.errors import PlanError
from pipar_jax.tuner.chain_search.costs import ChainCosts, Hop, Value, front
from pipar_jax.tuner.chain_search.problem import (
    ChainPlan,
    ChainProblem,
    ChainStage,
    Objective,
    check_name,
)

#: The codings of the boundaries so far, and the dimensions of the objective.
_Way = tuple[Value, tuple[Hop, ...]]


def plan_chain(
    problem: ChainProblem, objective: Objective = "steady", most_s: float = math.inf
) -> ChainPlan:
    """Returns the cheapest chain.

    Args:
      problem: The problem.
      objective: The objective to minimise.
      most_s: Upper limit of the cost, in seconds.

    Raises:
      PlanError: There is no such objective, no assignment fits into memory, or all cost more than
        ``most_s``.
    """
    check_name(objective)
    search = _Search(ChainCosts(problem, objective))
    least = search.least
    for gap in (1.01, 1.03, 1.1, 1.3, 2.0, 4.0, 16.0, math.inf):
        limit = least * gap if least else math.inf
        chain = search.within(min(limit, most_s))
        if chain is not None:
            return evaluate(problem, objective, chain.order, chain.cuts)
        if most_s <= limit and most_s < math.inf:
            raise PlanError(f"no chain costs {most_s:.4g} s or less by objective {objective!r}")
    layers = problem.nodes[0].layers[problem.first : problem.stop]
    needs = [
        problem.memory_bytes(layer.weight_bytes, layer.activation_bytes) / 1e6 for layer in layers
    ]
    raise PlanError(
        f"layers {problem.first} to {problem.stop - 1} for {problem.owners} owners need "
        f"{sum(needs):.1f} MB in all and {max(needs):.1f} MB for the largest of them, which do not "
        f"fit in the nodes' {', '.join(f'{n.memory_bytes / 1e6:.1f}' for n in problem.nodes)} MB: "
        "add nodes or memory, serve fewer owners, or share weights"
    )


def evaluate(
    problem: ChainProblem, objective: Objective, order: Sequence[int], cuts: Sequence[int]
) -> ChainPlan:
    """Returns the cost of one assignment of layers, whether it fits into memory or not.

    Every boundary has the best codecs for this chain.

    Args:
      problem: The problem.
      objective: The objective.
      order: Indices of the nodes used, in chain order.
      cuts: Positions between them.

    Raises:
      PlanError: There is no such objective, or the cuts do not match the order or the layers.
    """
    check_name(objective)
    bounds = (problem.first, *cuts, problem.stop)
    if len(bounds) != len(order) + 1 or list(bounds) != sorted(set(bounds)):
        raise PlanError(
            f"cuts {tuple(cuts)} do not divide layers {problem.first} to {problem.stop - 1} among "
            f"{len(order)} nodes: name increasing positions, one fewer than nodes"
        )
    costs = ChainCosts(problem, objective)
    ways: list[_Way] = [(costs.start, ())]

    last: int | None = None
    stages = []
    for node, first, stop in zip(order, bounds[:-1], bounds[1:], strict=True):
        forward_s, backward_s = costs.compute(node, first, stop)
        ways = _crossed(costs, ways, costs.hops(last, node, first), forward_s, backward_s)
        stages.append(
            ChainStage(problem.nodes[node].name, first, stop, forward_s, backward_s,
                  costs.memory(node, first, stop))
        )  # fmt: skip
        last = node
    ways = _crossed(costs, ways, costs.hops(last, None, problem.stop), 0.0, 0.0)
    value, hops = min(ways, key=lambda way: costs.total(way[0]))
    cycle_s = costs.fixed_cycle_s + sum(hop.cycle_s for hop in hops)
    cycle_s += sum(stage.forward_s + stage.backward_s for stage in stages)
    pairs = tuple(hop.pair for hop in hops)
    return ChainPlan(objective, costs.total(value), tuple(stages), cycle_s, pairs)


def _crossed(
    costs: ChainCosts, ways: list[_Way], hops: Sequence[Hop], forward_s: float, backward_s: float
) -> list[_Way]:
    """Returns the useful codings of one more boundary, with the node after it."""
    return front(
        (
            (costs.extend(value, hop, forward_s, backward_s), (*crossed, hop))
            for value, crossed in ways
            for hop in hops
        ),
        lambda way: way[0],
    )


class _Chain(NamedTuple):
    """A partial chain, linked to the chain that it extends.

    Attributes:
      value: The objective's two dimensions so far.
      before: The chain without its last node; None for the empty one.
      node: Index of its last node; -1 for none.
      position: The first layer that is not assigned.
    """

    value: Value
    before: _Chain | None
    node: int
    position: int

    def links(self) -> Iterator[_Chain]:
        """Yields the chain and its non-empty prefixes, longest first."""
        chain: _Chain | None = self
        while chain is not None and chain.before is not None:
            yield chain
            chain = chain.before

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of its nodes, in chain order."""
        return tuple(chain.node for chain in self.links())[::-1]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions between its nodes."""
        return tuple(chain.position for chain in self.links())[:0:-1]


class _Search:
    """The search for one problem; nodes that differ only in name are of one kind."""

    def __init__(self, costs: ChainCosts) -> None:
        self._costs = costs
        problem = costs.problem
        kinds: dict[object, list[int]] = {}
        for index, node in enumerate(problem.nodes):
            # With a fixed order every node is its own kind.
            anonymous = dataclasses.replace(node, name="")
            key: object = anonymous if problem.any_order else index
            kinds.setdefault(key, []).append(index)
        self._kinds = tuple(tuple(members) for members in kinds.values())
        self._powers: dict[tuple[int, ...], tuple[float, float, float]] = {}
        self._none_used = (0,) * len(self._kinds)
        self.least = costs.bound(costs.start, problem.first, self._power(self._none_used))

    def within(self, limit: float) -> _Chain | None:
        """Returns the cheapest chain that costs no more than a limit, or None."""
        problem = self._costs.problem
        fronts: dict[int, dict[tuple[tuple[int, ...], int], list[_Chain]]] = {
            position: {} for position in range(problem.first, problem.stop + 1)
        }
        empty = _Chain(self._costs.start, None, -1, problem.first)
        fronts[problem.first][self._none_used, -1] = [empty]
        for position in range(problem.first, problem.stop):
            for (used, last), chains in fronts.pop(position).items():
                for kind in self._next_kinds(used, last):
                    self._extend(fronts, chains, used, kind, position, limit)
        best, best_cost = None, math.inf
        for whole in fronts[problem.stop].values():
            for chain in whole:
                for hop in self._costs.hops(chain.node, None, problem.stop):
                    cost = self._costs.total(self._costs.extend(chain.value, hop, 0.0, 0.0))
                    if cost <= limit and cost < best_cost:
                        best, best_cost = chain, cost
        return best

    def _next_kinds(self, used: tuple[int, ...], last: int) -> list[int]:
        """Returns the kinds of the possible next nodes."""
        start = 0 if self._costs.problem.any_order else last + 1
        return [k for k in range(start, len(self._kinds)) if used[k] < len(self._kinds[k])]

    def _extend(
        self,
        fronts: dict[int, dict[tuple[tuple[int, ...], int], list[_Chain]]],
        chains: list[_Chain],
        used: tuple[int, ...],
        kind: int,
        position: int,
        limit: float,
    ) -> None:
        """Adds every run of layers from a position that fits on a node of a kind."""
        costs = self._costs
        node = self._kinds[kind][used[kind]]
        memory_bytes = costs.problem.nodes[node].memory_bytes
        now_used = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
        power = self._power(now_used)
        last = chains[0].node
        hops = costs.hops(last if last >= 0 else None, node, position)
        for stop in range(position + 1, costs.problem.stop + 1):
            if costs.memory(node, position, stop) > memory_bytes:
                break  # longer runs take more memory still
            forward_s, backward_s = costs.compute(node, position, stop)
            alone = [(costs.extend(costs.start, hop, forward_s, backward_s), hop) for hop in hops]
            if all(costs.total(value) > limit for value, _ in alone):
                break  # and more time
            able = [hop for value, hop in alone if costs.bound(value, stop, power) <= limit]
            if not able:
                continue
            target = fronts[stop].setdefault((now_used, kind), [])
            for chain in chains:
                for hop in able:
                    value = costs.extend(chain.value, hop, forward_s, backward_s)
                    if costs.bound(value, stop, power) <= limit:
                        _insert(target, _Chain(value, chain, node, stop))
            if not target:
                del fronts[stop][now_used, kind]

    def _power(self, used: tuple[int, ...]) -> tuple[float, float, float]:
        """Returns the speed of the remaining nodes."""
        power = self._powers.get(used)
        if power is None:
            kinds = zip(self._kinds, used, strict=True)
            left = [node for members, count in kinds for node in members[count:]]
            power = self._powers[used] = self._costs.power(left)
        return power


def _insert(chains: list[_Chain], chain: _Chain) -> None:
    """Adds a chain to a Pareto front unless one there is as good in both dimensions."""
    first, second = chain.value
    if any(kept.value[0] <= first and kept.value[1] <= second for kept in chains):
        return
    chains[:] = [kept for kept in chains if kept.value[0] < first or kept.value[1] < second]
    chains.append(chain)
