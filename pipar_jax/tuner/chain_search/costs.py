"""The objectives of chain planning on prefix sums, and bounds of incomplete chains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.tuner.chain_search.problem import ChainProblem, Coding, Layer, Objective, Pair

_T = TypeVar("_T")

#: The two dimensions of the objective.
Value = tuple[float, float]


class Hop(NamedTuple):
    """Costs of a boundary between two hosts per batch.

    Attributes:
      load_s: Seconds of its busier direction, including encoding and decoding.
      cycle_s: Seconds of the activation and of the cotangent crossing it.
      pair: Codings of both.
    """

    load_s: float
    cycle_s: float
    pair: Pair


class ChainCosts:
    """The two dimensions of the objective, computed from prefix sums.

    ``mpsl``: (longest forward, longest backward), added up at the end. Others: (the busiest
    resource's load, the owner's cycle so far). ``steady`` is the larger of the load and the cycle
    divided by K; ``accept`` the load; ``step`` the load of all but one of the parts plus the cycle
    of one.
    """

    def __init__(self, problem: ChainProblem, objective: Objective) -> None:
        self.problem, self.objective = problem, objective
        self._hops: dict[tuple[int | None, int | None, int], Sequence[Hop]] = {}
        self._sums = [
            [
                prefix_sums([layer.forward_s / node.speed for layer in node.layers]),
                prefix_sums([layer.backward_s / node.speed for layer in node.layers]),
                prefix_sums([layer.weight_bytes for layer in node.layers]),
                prefix_sums([layer.activation_bytes for layer in node.layers]),
            ]
            for node in problem.nodes
        ]
        self.fixed_cycle_s = own_s = self._owner_s()
        self._parts = problem.owners * (problem.micro_batches if objective == "step" else 1)
        self._cycle_counts = objective == "step" or (
            objective == "steady" and problem.owner is not None
        )
        # An owner computes only its own batches. Irrelevant costs are not part of a dimension.
        load_s = 0.0 if objective == "mpsl" else own_s / problem.owners
        self.start: Value = (load_s, own_s if self._cycle_counts else 0.0)
        relative = [
            self._relative(lambda layer: layer.forward_s),
            self._relative(lambda layer: layer.backward_s),
            self._relative(lambda layer: layer.forward_s + layer.backward_s),
        ]
        self._least = [least for least, _ in relative]
        self._speeds = [speeds for _, speeds in relative]

    def compute(self, node: int, first: int, stop: int) -> Value:
        """Returns forward and backward seconds of a run of layers on a node."""
        forward, backward, _, _ = self._sums[node]
        return forward[stop] - forward[first], backward[stop] - backward[first]

    def memory(self, node: int, first: int, stop: int) -> float:
        """Returns the memory of a run of layers on a node."""
        _, _, weights, activations = self._sums[node]
        return self.problem.memory_bytes(
            weights[stop] - weights[first], activations[stop] - activations[first]
        )

    def hops(self, lower: int | None, upper: int | None, position: int) -> Sequence[Hop]:
        """Returns the costs of crossing a position, for all codings that may be optimal.

        The codecs of a boundary do not affect other boundaries, so that its least load is best if
        only loads count. If the cycle counts as well, the Pareto front of both is returned, the
        least load first.

        Args:
          lower: Index of the node below; None stands for the owner.
          upper: Index of the node above; None stands for the owner.
          position: The layer after the boundary.
        """
        key = lower, upper, position
        if key not in self._hops:
            self._hops[key] = self._all_hops(lower, upper, position)
        return self._hops[key]

    def _all_hops(self, lower: int | None, upper: int | None, position: int) -> Sequence[Hop]:
        """Computes the result of ``hops`` for a new boundary."""
        problem = self.problem
        # If the last node has the end of the model, and so the loss, nothing returns to the owner.
        at_the_end = upper is None and position == len(problem.nodes[0].layers)
        if at_the_end or ((lower is None or upper is None) and not problem.owner):
            pair = Pair(problem.activation_codings[0], problem.cotangent_codings[0])
            return (Hop(0.0, 0.0, pair),)
        # A node's link carries every owner's batches, an owner's only its own.
        share = 1 if lower is not None and upper is not None else problem.owners
        host = problem.owner if lower is None or upper is None else problem.nodes[lower]
        assert host is not None
        links = (host.down, host.up) if upper is None else (host.up, host.down)
        raw_bytes = problem.nodes[0].layers[position - 1].activation_bytes
        there, back = (
            [(coding, *_way(coding, raw_bytes, link, share)) for coding in codings]
            for codings, link in zip(
                (problem.activation_codings, problem.cotangent_codings), links, strict=True
            )
        )
        hops = front(
            (
                Hop(max(load_s, back_load_s), cycle_s + back_cycle_s, Pair(activation, cotangent))
                for activation, load_s, cycle_s in there
                for cotangent, back_load_s, back_cycle_s in back
            ),
            lambda hop: (hop.load_s, hop.cycle_s),
        )
        if self.objective == "mpsl":  # links have no cost, but a coding has to be chosen
            return (Hop(0.0, 0.0, hops[0].pair),)
        return hops if self._cycle_counts else hops[:1]

    def extend(self, value: Value, hop: Hop, forward_s: float, backward_s: float) -> Value:
        """Returns the value of a chain with one more hop and node."""
        if self.objective == "mpsl":
            return max(value[0], forward_s), max(value[1], backward_s)
        both = forward_s + backward_s
        cycle_s = value[1] + hop.cycle_s + both if self._cycle_counts else 0.0
        return max(value[0], hop.load_s, both), cycle_s

    def total(self, value: Value) -> float:
        """Returns the objective of a complete chain."""
        load_s, cycle_s = value
        if self.objective == "mpsl":
            return load_s + cycle_s
        if not self._cycle_counts:
            return load_s
        if self.objective == "steady":
            return max(load_s, cycle_s / self._parts)
        return load_s * (1 - 1 / self._parts) + cycle_s / self._parts

    def bound(self, value: Value, position: int, power: Sequence[float]) -> float:
        """Returns a lower bound of all completions.

        Args:
          value: The chain so far.
          position: The first layer that is not placed yet.
          power: Result of ``power`` for the remaining nodes.
        """
        last = self.problem.stop
        forward, backward, both = (sums[last] - sums[position] for sums in self._least)
        if self.objective == "mpsl":
            return max(value[0], _even(forward, power[0])) + max(
                value[1], _even(backward, power[1])
            )
        return self.total((max(value[0], _even(both, power[2])), value[1] + both))

    def power(self, left: Iterable[int]) -> tuple[float, float, float]:
        """Returns the sum of some nodes' speeds, relative to the fastest node of each layer.

        A node's relative speed is that for its most suitable layer, so that ``sum_l least_l / sum_i
        speed_i`` never exceeds the longest of these nodes.
        """
        chosen = list(left)
        forward, backward, both = (sum(speeds[i] for i in chosen) for speeds in self._speeds)
        return forward, backward, both

    def _owner_s(self) -> float:
        """Returns the seconds of the owner's own layers."""
        problem = self.problem
        if problem.owner is None:
            return 0.0
        layers = problem.owner.layers
        mine = (*layers[: problem.first], *layers[problem.stop :])
        return sum(unit.forward_s + unit.backward_s for unit in mine) / problem.owner.speed

    def _relative(self, pick: Callable[[Layer], float]) -> tuple[list[float], list[float]]:
        """Returns prefix sums of each layer's least time, and each node's relative speed."""
        problem = self.problem
        times = [[pick(layer) / node.speed for layer in node.layers] for node in problem.nodes]
        least = [min(column) for column in zip(*times, strict=True)]
        middle = range(problem.first, problem.stop)
        speeds = [
            max((least[i] / row[i] for i in middle if row[i] > 0), default=1.0) for row in times
        ]
        return prefix_sums(least), speeds


def front(items: Iterable[_T], value: Callable[[_T], Value]) -> list[_T]:
    """Returns the Pareto front of items, ordered by the first dimension."""
    kept: list[_T] = []
    for item in sorted(items, key=value):
        if not kept or value(item)[1] < value(kept[-1])[1]:
            kept.append(item)
    return kept


def _way(coding: Coding, raw_bytes: float, link: LinkModel, share: int) -> Value:
    """Returns load and cycle of one direction of a boundary.

    Args:
      coding: Coding of the tensor.
      raw_bytes: Bytes before coding.
      link: The link of the direction.
      share: Number of owners whose batches use equal links, each its own.
    """
    nbytes, coding_s = raw_bytes * coding.ratio, raw_bytes * coding.s_per_byte
    return link.occupied_s(nbytes) / share + coding_s, link.transfer_s(nbytes) + coding_s


def prefix_sums(values: Iterable[float]) -> list[float]:
    """Returns 0, then the running sums."""
    return list(itertools.accumulate(values, initial=0.0))


def _even(work_s: float, power: float) -> float:
    """Returns the time of work spread evenly over nodes; infinite if there are none."""
    if power > 0:
        return work_s / power
    return math.inf if work_s > 0 else 0.0
