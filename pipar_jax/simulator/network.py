"""Links and routes of a simulated round, with their state."""

from __future__ import annotations

import math

from pipar_jax.cost_model.costs import FREE_LINK, Costs, on_grid
from pipar_jax.schedule.actions import BACKWARD, SEND_BACKWARD, SEND_CLIENT_MODEL, SEND_FORWARD
from pipar_jax.schedule.dispatch import CreditedLink
from pipar_jax.schedule.host_program import Operation
from pipar_jax.schedule.plan import COORDINATOR, is_node

#: Instead of a stage's index, for the coordinator's links to hosts, which belong to no boundary.
CONTROL = -1


class Line:
    """A line: a link, or links that share one shaper.

    Attributes:
      free_s: Time at which all queued messages have left.
    """

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0


class Direction:
    """One direction of a link: a queue, and the bytes that the receiver has not consumed.

    Attributes:
      source: Name of the sending host.
      target: Name of the receiving host.
      below: Index of the stage below the boundary that it crosses; ``CONTROL`` if it serves all.
      line: Its line, possibly shared with other directions.
      outstanding: Bytes queued or not yet consumed.
      credited: Its credit as seen by dispatchers, including reservations.
      carried: Bytes sent so far.
      delay_s: One-way delay.
    """

    __slots__ = ("_model", "_occupied_s", "_window", "below", "carried", "credited", "delay_s",
                 "line", "outstanding", "source", "target")  # fmt: skip

    def __init__(self, source: str, target: str, below: int, line: Line, costs: Costs) -> None:
        model = costs.links.get((source, target), FREE_LINK)
        self.source, self.target, self.below, self.line = source, target, below, line
        self._model = model
        self._occupied_s: dict[float, float] = {}
        self.delay_s = on_grid(model.delay_s)
        self._window = costs.window_bytes
        self.outstanding = self.carried = 0.0
        self.credited = CreditedLink(self)

    @property
    def available_bytes(self) -> float:
        """Bytes that the link accepts before it has to wait."""
        return math.inf if self._window is None else self._window - self.outstanding

    def can_send(self, nbytes: float) -> bool:
        """Returns whether the link accepts a message of this size now."""
        return not self.outstanding or nbytes <= self.available_bytes

    def send(self, now_s: float, nbytes: float) -> tuple[float, float]:
        """Queues a message; returns when its first and its last byte leave."""
        line = self.line
        start = line.free_s if line.free_s > now_s else now_s
        occupied = self._occupied_s.get(nbytes)
        if occupied is None:
            occupied = self._occupied_s[nbytes] = on_grid(self._model.occupied_s(nbytes))
        end = start + occupied
        line.free_s = end
        self.carried += nbytes
        return start, end

    def __str__(self) -> str:
        behind = "" if self.below == CONTROL else f" behind stage {self.below}"
        return f"{self.source} to {self.target}{behind}"


class SimulatedNetwork:
    """All directions of all links, created on first use.

    Links are those of the runtime: at the coordinator's host all boundaries of a peer share its
    link to the coordinator; every other boundary has its own link and credit. All links from a
    device share one line, as do the links from a host to a device; two nodes have a line per
    boundary.

    Args:
      costs: Links and windows.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._lines: dict[tuple[str, str, int], Line] = {}
        self.directions: dict[tuple[str, str, int], Direction] = {}

    def direction(self, source: str, target: str, below: int = CONTROL) -> Direction:
        """Returns one direction of the link between two hosts.

        Args:
          source: The sending host.
          target: The receiving host.
          below: Index of the stage below the boundary.
        """
        if COORDINATOR in (source, target):
            below = CONTROL
        key = source, target, below
        direction = self.directions.get(key)
        if direction is None:
            line = self._lines.setdefault(_line_of(*key), Line())
            direction = self.directions[key] = Direction(*key, line, self._costs)
        return direction

    def carried(self) -> dict[tuple[str, str], float]:
        """Returns the bytes sent so far by direction (from, to), over all links of two hosts."""
        totals: dict[tuple[str, str], float] = {}
        for (source, target, _), direction in self.directions.items():
            totals[source, target] = totals.get((source, target), 0.0) + direction.carried
        return totals

    def control(self, source: str, now_s: float, target: str = COORDINATOR) -> float:
        """Returns the arrival time of a control message, which overtakes tensors."""
        if source == target:
            return now_s
        model = self._costs.links.get((source, target), FREE_LINK)
        return now_s + on_grid(model.message_s + model.delay_s)

    def times(self) -> list[Line]:
        """Returns all lines, in the order of first use."""
        return list(self._lines.values())


def _line_of(source: str, target: str, below: int) -> tuple[str, str, int]:
    """Returns the key of a direction's line, equal for all directions that share it."""
    if source != COORDINATOR and not is_node(source):
        return source, "", CONTROL  # a device has one radio for all messages that it sends
    if target != COORDINATOR and not is_node(target):
        return source, target, CONTROL
    return source, target, below


class Route:
    """An operation with its links and cached costs.

    Attributes:
      operation: The operation.
      after_rest_s: Seconds that the computation takes more after a rest of its host.
      out: Link of the result; None if it stays.
      source: Link of the input; None if it is on the host already.
    """

    __slots__ = ("_costs", "_known", "after_rest_s", "operation", "out", "source")

    def __init__(self, operation: Operation, network: SimulatedNetwork, costs: Costs) -> None:
        self.operation = operation
        self._costs = costs
        self._known: dict[int, tuple[float, float, float]] = {}
        self.out = self.source = None
        self.after_rest_s = 0.0
        if costs.after_rest_s is not None and operation.kind != SEND_CLIENT_MODEL:
            self.after_rest_s = on_grid(
                costs.after_rest_s(operation.place, operation.stage, operation.kind, 0)
            )
        if (target := operation.target) is not None:
            self.out = network.direction(operation.host, target.peer(operation.host), target.below)
        if (source := operation.source) is not None:
            peer = source.peer(operation.host)
            self.source = network.direction(peer, operation.host, source.below)

    def cost(self, samples: int) -> tuple[float, float, float]:
        """Returns the seconds of the computation, and the bytes of its result and input."""
        known = self._known.get(samples)
        if known is None:
            operation, seconds = self.operation, 0.0
            if (
                operation.kind != SEND_CLIENT_MODEL
            ):  # not a computation; its message belongs to the exchange
                seconds = self._costs.compute_s(
                    operation.place, operation.stage, operation.kind, samples
                )
            out = came = 0.0
            if self.out is not None:
                out = self._costs.wire_bytes(
                    operation.place, operation.stage, operation.sent, samples
                )
            if self.source is not None:
                back = operation.kind == BACKWARD
                came = self._costs.wire_bytes(
                    operation.place, operation.stage + (1 if back else -1),
                    SEND_BACKWARD if back else SEND_FORWARD, samples,
                )  # fmt: skip
            known = self._known[samples] = (on_grid(seconds), out, came)
        return known
