"""Links, ports and routes of a simulated round, with their state."""

from __future__ import annotations

from pipar_jax.plan import COORDINATOR, Plan
from pipar_jax.schedule import (
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
from pipar_jax.simulator.costs import FREE_LINK, Costs, on_grid


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
      free_s: When everything queued so far has left.
      outstanding: Bytes promised, queued or waiting to be consumed.
      carried: Bytes sent so far.
      delay_s: One-way delay.
    """

    __slots__ = ("_in", "_model", "_occupied_s", "_out", "_window", "carried", "delay_s",
                 "free_s", "outstanding", "source", "target")  # fmt: skip

    def __init__(self, source: str, target: str, costs: Costs, out: Way, into: Way) -> None:
        model = costs.links.get((source, target), FREE_LINK)
        self.source, self.target = source, target
        self._model = model
        self._occupied_s: dict[float, float] = {}
        self.delay_s = on_grid(model.delay_s)
        self._window = costs.window_bytes
        self._out = out if out.rate_bytes_s is not None else None
        self._in = into if into.rate_bytes_s is not None else None
        self.free_s = self.outstanding = self.carried = 0.0

    def can_send(self, nbytes: float) -> bool:
        """Says whether the link takes a message of this size now."""
        return (
            self._window is None
            or not self.outstanding
            or self.outstanding + nbytes <= self._window
        )

    def send(self, now_s: float, nbytes: float) -> tuple[float, float]:
        """Queues a message; returns when its first and its last byte leave."""
        start = self.free_s if self.free_s > now_s else now_s
        occupied = self._occupied_s.get(nbytes)
        if occupied is None:
            occupied = self._occupied_s[nbytes] = on_grid(self._model.occupied_s(nbytes))
        end = start + occupied
        if self._out is not None:
            end = max(end, self._out.pass_s(start, nbytes))
        if self._in is not None:
            end = max(end, self._in.pass_s(start, nbytes))
        self.free_s = end
        self.carried += nbytes
        return start, end

    def __str__(self) -> str:
        return f"{self.source} to {self.target}"


class Network:
    """All directions of all links, made when first used.

    Args:
      costs: Links, ports and windows.
    """

    def __init__(self, costs: Costs) -> None:
        """See the class."""
        self._costs = costs
        self._ways: dict[tuple[str, bool], Way] = {}
        self.directions: dict[tuple[str, str], Direction] = {}

    def direction(self, source: str, target: str) -> Direction:
        """Returns one direction of the link between two hosts."""
        found = self.directions.get((source, target))
        if found is None:
            out, into = self._way(source, True), self._way(target, False)
            found = Direction(source, target, self._costs, out, into)
            self.directions[source, target] = found
        return found

    def control(self, source: str, now_s: float, target: str = COORDINATOR) -> float:
        """Returns when a control message, which overtakes tensors, has arrived."""
        if source == target:
            return now_s
        model = self._costs.links.get((source, target), FREE_LINK)
        return now_s + on_grid(model.message_s + model.delay_s)

    def times(self) -> list[Way | Direction]:
        """Returns everything that is busy until some time, in the order of first use."""
        return [*self.directions.values(), *self._ways.values()]

    def _way(self, host: str, out: bool) -> Way:
        """Returns one direction of a host's port."""
        key = host, out
        if key not in self._ways:
            port = self._costs.ports.get(host)
            rate = None if port is None else port.out_bytes_s if out else port.in_bytes_s
            self._ways[key] = Way(rate)
        return self._ways[key]


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
            self.out = network.direction(self.host, hosts[self.target_stage])
        before = stage + 1 if kind == BACKWARD else stage - 1
        if kind in (FORWARD, LAST, BACKWARD) and before >= 0 and hosts[before] != self.host:
            self.source = network.direction(hosts[before], self.host)
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
