"""The objectives of chain planning over prefix sums, and a bound for what is not placed yet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pipar_jax.chain_planner.problem import ChainProblem, Layer, Objective

#: The objective's two dimensions, so far.
Value = tuple[float, float]


class Hop(NamedTuple):
    """What a boundary between two hosts costs per batch.

    Attributes:
      load_s: Seconds for which it occupies the busier direction of the nodes' link.
      cycle_s: Seconds that the activation and, later, the cotangent take to cross it.
    """

    load_s: float
    cycle_s: float


class ChainCosts:
    """The objective's two dimensions over prefix sums.

    ``mpsl``: (longest forward, longest backward), added up at the end. Others: (the busiest
    resource's load, the owner's cycle so far), of which the larger counts, the cycle shared by K.
    """

    def __init__(self, problem: ChainProblem, objective: Objective) -> None:
        self.problem, self.objective = problem, objective
        self._sums = [
            [
                prefix_sums([layer.forward_s / node.speed for layer in node.layers]),
                prefix_sums([layer.backward_s / node.speed for layer in node.layers]),
                prefix_sums([layer.weight_bytes for layer in node.layers]),
                prefix_sums([layer.activation_bytes for layer in node.layers]),
            ]
            for node in problem.nodes
        ]
        self._divisor = problem.owners if objective == "steady" and problem.owner else math.inf
        self.fixed_cycle_s = self._owner_s()
        self.start: Value = (0.0, 0.0 if objective == "mpsl" else self.fixed_cycle_s)
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
        """Returns the bytes that a run of layers takes on a node."""
        _, _, weights, activations = self._sums[node]
        return self.problem.memory_bytes(
            weights[stop] - weights[first], activations[stop] - activations[first]
        )

    def hop(self, one: int | None, other: int | None, position: int) -> Hop:
        """Returns what crossing a position costs; None stands for the owner."""
        problem = self.problem
        if self.objective == "mpsl" or ((one is None or other is None) and not problem.owner):
            return Hop(0.0, 0.0)
        raw = problem.nodes[0].layers[position - 1].activation_bytes
        there = raw * problem.activation_ratio
        back = raw * problem.cotangent_ratio
        codec_s = raw * problem.codec_s_per_byte
        ends = [problem.nodes[i].port for i in (one, other) if i is not None]
        # Links between nodes carry every owner's batches; an owner's link only its own, so of it
        # nothing but the node's end is a shared resource.
        load_s = max(max(port.occupied_s(there), port.occupied_s(back)) for port in ends)
        ways = [list(ends), list(ends)]
        if one is None or other is None:
            assert problem.owner is not None
            up, down = problem.owner.up, problem.owner.down
            ways[0].append(up if one is None else down)
            ways[1].append(down if one is None else up)
        cycle_s = 2 * codec_s
        for way, nbytes in zip(ways, (there, back), strict=True):
            cycle_s += max(link.occupied_s(nbytes) for link in way)
            cycle_s += max(link.delay_s for link in way)
        return Hop(load_s + codec_s, cycle_s)

    def extend(self, value: Value, hop: Hop, forward_s: float, backward_s: float) -> Value:
        """Returns the value of a chain with one more hop and node."""
        if self.objective == "mpsl":
            return max(value[0], forward_s), max(value[1], backward_s)
        both = forward_s + backward_s
        return max(value[0], hop.load_s, both), value[1] + hop.cycle_s + both

    def total(self, value: Value) -> float:
        """Returns the objective of a complete chain."""
        if self.objective == "mpsl":
            return value[0] + value[1]
        return max(value[0], value[1] / self._divisor)

    def bound(self, value: Value, position: int, power: Sequence[float]) -> float:
        """Returns what no completion can undercut.

        Args:
          value: The chain so far.
          position: The first layer that is not placed yet.
          power: What ``power`` returned for the nodes left.
        """
        last = self.problem.stop
        forward, backward, both = (sums[last] - sums[position] for sums in self._least)
        if self.objective == "mpsl":
            return max(value[0], _even(forward, power[0])) + max(
                value[1], _even(backward, power[1])
            )
        cycle = (value[1] + both) / self._divisor
        return max(value[0], _even(both, power[2]), cycle)

    def power(self, left: Iterable[int]) -> tuple[float, float, float]:
        """Returns the sum of some nodes' speeds, relative to the fastest node of each layer.

        A node's relative speed is that of the layer that suits it best, so that
        ``sum_l least_l / sum_i speed_i`` never exceeds the longest of these nodes.
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
        return sum(one.forward_s + one.backward_s for one in mine) / problem.owner.speed

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


def prefix_sums(values: Iterable[float]) -> list[float]:
    """Returns 0, then the running sums."""
    return list(itertools.accumulate(values, initial=0.0))


def _even(work_s: float, power: float) -> float:
    """Returns the time of work spread evenly over nodes; infinite if there are none."""
    if power > 0:
        return work_s / power
    return math.inf if work_s > 0 else 0.0
