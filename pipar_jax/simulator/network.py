"""Links, ports and routes of a simulated round, with their state."""

from __future__ import annotations

from pipar_jax.cost_model.costs import FREE_LINK, Costs, on_grid
from pipar_jax.schedule.actions import (
    ALL,
    BACKWARD,
    FORWARD,
    HAND_ON,
    LAST,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
)
from pipar_jax.schedule.plan import COORDINATOR, Plan, is_node

#: Stands for a stage's index where a link belongs to no boundary: the coordinator's to a host.
CONTROL = -1


class Line:
    """What messages leave by one after another: a link, or links that share one shaper.

    Attributes:
      free_s: When everything queued so far has left.
    """

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0


class Way:
    """One direction of a host's port, which its links share."""

    __slots__ = ("free_s", "rate_bytes_s")

    def __init__(self, rate_bytes_s: float | None) -> None:
        self.rate_bytes_s = rate_bytes_s
        self.free_s = 0.0

    def pass_s(self, start_s: float, nbytes: float) -> float:
        """Lets a message through; returns when its last byte has passed."""
        if self.rate_bytes_s is None:
            return start_s
        self.free_s = max(self.free_s, start_s) + on_grid(nbytes / self.rate_bytes_s)
        return self.free_s


class Direction:
    """One direction of a link: a queue, and the bytes that wait to be consumed at its end.

    It is the outlet that dispatchers see. What a dispatched computation will send is taken from
    the credit at once, as the runtime does.

    Attributes:
      source: Name of the sending host.
      target: Name of the receiving host.
      below: Index of the stage below the boundary that it crosses; ``CONTROL`` if it serves all.
      line: What it sends by, perhaps with other directions.
      outstanding: Bytes promised, queued or waiting to be consumed.
      carried: Bytes sent so far.
      delay_s: One-way delay.
    """

    __slots__ = ("_in", "_model", "_occupied_s", "_out", "_window", "below", "carried", "delay_s",
                 "line", "outstanding", "source", "target")  # fmt: skip

    def __init__(
        self, source: str, target: str, below: int, line: Line, costs: Costs, out: Way, into: Way
    ) -> None:
        model = costs.links.get((source, target), FREE_LINK)
        self.source, self.target, self.below, self.line = source, target, below, line
        self._model = model
        self._occupied_s: dict[float, float] = {}
        self.delay_s = on_grid(model.delay_s)
        self._window = costs.window_bytes
        self._out = out if out.rate_bytes_s is not None else None
        self._in = into if into.rate_bytes_s is not None else None
        self.outstanding = self.carried = 0.0

    def can_send(self, nbytes: float) -> bool:
        """Says whether the link takes a message of this size now."""
        return (
            self._window is None
            or not self.outstanding
            or self.outstanding + nbytes <= self._window
        )

    def send(self, now_s: float, nbytes: float) -> tuple[float, float]:
        """Queues a message; returns when its first and its last byte leave."""
        line = self.line
        start = line.free_s if line.free_s > now_s else now_s
        occupied = self._occupied_s.get(nbytes)
        if occupied is None:
            occupied = self._occupied_s[nbytes] = on_grid(self._model.occupied_s(nbytes))
        end = start + occupied
        if self._out is not None:
            end = max(end, self._out.pass_s(start, nbytes))
        if self._in is not None:
            end = max(end, self._in.pass_s(start, nbytes))
        line.free_s = end
        self.carried += nbytes
        return start, end

    def __str__(self) -> str:
        behind = "" if self.below == CONTROL else f" behind stage {self.below}"
        return f"{self.source} to {self.target}{behind}"


class Network:
    """All directions of all links, made when first used.

    Links are those of the runtime (``runtime.wiring``, ``runtime.neighbours``): what crosses a
    boundary at the coordinator's host uses that host's one link to the coordinator, every other
    boundary has a link, and so a credit, of its own. What a device sends shares one line whatever
    link it takes, as do the links from one host to one device; two nodes have a line per boundary.

    Args:
      costs: Links, ports and windows.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._ways: dict[tuple[str, bool], Way] = {}
        self._lines: dict[tuple[str, str, int], Line] = {}
        self.directions: dict[tuple[str, str, int], Direction] = {}

    def direction(self, source: str, target: str, below: int = CONTROL) -> Direction:
        """Returns one direction of the link between two hosts.

        Args:
          source: The sending host.
          target: The receiving host.
          below: Index of the stage below the boundary that is crossed.
        """
        if COORDINATOR in (source, target):
            below = CONTROL
        key = source, target, below
        found = self.directions.get(key)
        if found is None:
            out, into = self._way(source, True), self._way(target, False)
            line = self._lines.setdefault(_line_of(*key), Line())
            found = self.directions[key] = Direction(*key, line, self._costs, out, into)
        return found

    def carried(self) -> dict[tuple[str, str], float]:
        """Returns for each pair (from, to) the bytes sent so far, over all links between them."""
        totals: dict[tuple[str, str], float] = {}
        for (source, target, _), one in self.directions.items():
            totals[source, target] = totals.get((source, target), 0.0) + one.carried
        return totals

    def control(self, source: str, now_s: float, target: str = COORDINATOR) -> float:
        """Returns when a control message, which overtakes tensors, has arrived."""
        if source == target:
            return now_s
        model = self._costs.links.get((source, target), FREE_LINK)
        return now_s + on_grid(model.message_s + model.delay_s)

    def times(self) -> list[Way | Line]:
        """Returns everything that is busy until some time, in the order of first use."""
        return [*self._lines.values(), *self._ways.values()]

    def _way(self, host: str, out: bool) -> Way:
        """Returns one direction of a host's port."""
        key = host, out
        if key not in self._ways:
            port = self._costs.ports.get(host)
            rate = None if port is None else port.out_bytes_s if out else port.in_bytes_s
            self._ways[key] = Way(rate)
        return self._ways[key]


def _line_of(source: str, target: str, below: int) -> tuple[str, str, int]:
    """Returns what a direction's line is called: directions of one line are called the same."""
    if source != COORDINATOR and not is_node(source):
        return source, "", CONTROL  # a device has one radio for all that it sends
    if target != COORDINATOR and not is_node(target):
        return source, target, CONTROL
    return source, target, below


class Route:
    """Where a computation's input comes from and its result goes to, with its cached costs.

    Attributes:
      host: Name of the host that computes it.
      out: Link that the result leaves by; None if it stays.
      sent: Kind of the send.
      received: Kind of the receive at the other end.
      target_stage: Stage that the result is for.
      source: Link that the input came by; None if it was there.
      got: Kind of the receive of the input.
    """

    __slots__ = ("_costs", "_known", "device", "got", "host", "kind", "out", "received", "sent",
                 "source", "stage", "target_stage")  # fmt: skip

    def __init__(
        self, plan: Plan, device: int, stage: int, kind: str, network: Network, costs: Costs
    ) -> None:
        self.device, self.stage, self.kind = device, stage, kind
        chain = plan.devices[0 if device == ALL else device].stages
        hosts = [plan.host(0 if device == ALL else device, s) for s in range(chain)]
        self.host = hosts[stage]
        self.out = self.source = None
        self.sent = self.received = self.got = ""
        self.target_stage = stage
        self._costs = costs
        self._known: dict[int, tuple[float, float, float]] = {}
        if kind in (BACKWARD, LAST) and stage:
            self.sent, self.received, self.target_stage = SEND_BACKWARD, RECEIVE_BACKWARD, stage - 1
        elif kind == FORWARD:
            self.sent, self.received, self.target_stage = SEND_FORWARD, RECEIVE_FORWARD, stage + 1
        if self.sent and hosts[self.target_stage] != self.host:
            below = min(stage, self.target_stage)
            self.out = network.direction(self.host, hosts[self.target_stage], below)
        before = stage + 1 if kind == BACKWARD else stage - 1
        if kind in (FORWARD, LAST, BACKWARD) and before >= 0 and hosts[before] != self.host:
            self.source = network.direction(hosts[before], self.host, min(stage, before))
            self.got = RECEIVE_BACKWARD if kind == BACKWARD else RECEIVE_FORWARD

    def cost(self, samples: int) -> tuple[float, float, float]:
        """Returns the computation's seconds, its result's and its input's bytes on the wire."""
        known = self._known.get(samples)
        if known is None:
            seconds = 0.0
            if self.kind != HAND_ON:  # no computation, and the message is the coordinator's matter
                seconds = self._costs.compute_s(self.device, self.stage, self.kind, samples)
            out = came = 0.0
            if self.out is not None:
                out = self._costs.wire_bytes(self.device, self.stage, self.sent, samples)
            if self.source is not None:
                back = self.kind == BACKWARD
                came = self._costs.wire_bytes(
                    self.device, self.stage + (1 if back else -1),
                    SEND_BACKWARD if back else SEND_FORWARD, samples,
                )  # fmt: skip
            known = self._known[samples] = (on_grid(seconds), out, came)
        return known
