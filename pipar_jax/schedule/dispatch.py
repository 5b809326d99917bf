"""Which of a host's ready actions runs next: the one dispatcher with two drivers.

The runtime drives a ``Dispatcher`` with compiled stages and sockets, the simulator with durations.
Both tell it what was added, what is complete and what has finished computing, and ask for the next
action. An action is *ready* when everything before it is complete, the link that its result leaves
by has credit for it, and its stage may hold one more micro-batch; the dispatch thread therefore
never blocks on a link, and a slow link delays nobody but its own device. Credits that are reserved
and micro-batches in flight are the dispatcher's state, so that a schedule that cannot deadlock in
the simulator cannot in the runtime.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pipar_jax.schedule.actions import BACKWARD, COMPUTE, FORWARD, SEND_CLIENT_MODEL, Action
from pipar_jax.schedule.policies import Key, Policy

#: Kinds that the dispatcher hands out; sends follow from them and receives are reported to it.
DISPATCHED = COMPUTE | {SEND_CLIENT_MODEL}


class OutgoingLink(Protocol):
    """One direction of a link, as far as credit goes."""

    @property
    def available_bytes(self) -> float:
        """Bytes that the link takes before it has to wait."""

    def can_send(self, nbytes: float) -> bool:
        """Returns whether the link takes a result of this size now."""


class CreditedLink:
    """A link's credit, less what is reserved for results that are being computed.

    Attributes:
      link: The link.
      reserved_bytes: Bytes of results that were dispatched and not handed to the link yet.
    """

    __slots__ = ("link", "reserved_bytes")

    def __init__(self, link: OutgoingLink) -> None:
        self.link = link
        self.reserved_bytes: float = 0

    def can_send(self, nbytes: float) -> bool:
        """Returns whether the link takes a result of this size now."""
        if not self.reserved_bytes:
            return self.link.can_send(nbytes)
        return self.link.available_bytes >= nbytes + self.reserved_bytes


class InFlightLimit:
    """How many micro-batches a stage with shared weights holds between forward and backward.

    Attributes:
      in_flight: Micro-batches between their forward and their backward.
      limit: How many there may be.
    """

    __slots__ = ("in_flight", "limit")

    def __init__(self, limit: int) -> None:
        self.in_flight = 0
        self.limit = limit


class Demand(NamedTuple):
    """What an action needs besides its predecessors before it may run.

    Attributes:
      link: The link that its result leaves by; None if it stays on the host.
      nbytes: Bytes of its result; 0 if it stays.
      limit: The limit of its stage, which a forward enters and a backward leaves; None without.
    """

    link: CreditedLink | None
    nbytes: float
    limit: InFlightLimit | None

    def is_met(self, action: Action) -> bool:
        """Returns whether the action may run now."""
        limit = self.limit
        if limit is not None and action.kind == FORWARD and limit.in_flight >= limit.limit:
            return False
        return self.link is None or self.link.can_send(self.nbytes)


#: An action, what must be complete before it, and what else it needs.
Row = tuple[Action, tuple[Action, ...], Demand | None]


class Dispatcher:
    """The state of one host's schedule: what waits, what is ready, what comes next.

    Not thread-safe: a host's dispatch thread owns it.

    Args:
      policy: Orders the ready actions.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._missing: dict[Action, int] = {}
        self._dependents: dict[Action, list[Action]] = {}
        self._ready: list[tuple[Key, Action]] = []
        self._complete: dict[tuple[int, int], set[Action]] = {}
        self._demands: dict[Action, Demand] = {}
        self._readied = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Adds this host's actions of a step.

        What is waited for may be complete already, also before it was added (a peer may be ahead).

        Args:
          rows: Actions of kinds in ``DISPATCHED``.
        """
        complete, dependents = self._complete, self._dependents
        for action, before, demand in rows:
            missing = 0
            for one in before:
                if one not in complete.get((one.device, one.step), ()):
                    dependents.setdefault(one, []).append(action)
                    missing += 1
            if demand is not None:
                self._demands[action] = demand
            self._missing[action] = missing
            if not missing:
                self._push(action)

    def complete(self, action: Action) -> None:
        """Reports an action on which others may wait: a receive, or a dispatched computation."""
        self._complete.setdefault((action.device, action.step), set()).add(action)
        for dependent in self._dependents.pop(action, ()):
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                self._push(dependent)

    def drop_step(self, device: int, step: int) -> None:
        """Drops what is known of a device's finished step; nothing later may wait for it."""
        self._complete.pop((device, step), None)

    def next(self) -> Action | None:
        """Returns the ready action to run now, or None if none may run.

        Its result's bytes are reserved on the link that it leaves by, and a forward counts as in
        flight, until ``finish`` and the backward's.
        """
        refused: list[tuple[Key, Action]] = []
        chosen: Action | None = None
        demand: Demand | None = None
        demands = self._demands
        while self._ready:
            entry = heapq.heappop(self._ready)
            demand = demands.get(entry[1]) if demands else None
            if demand is None or demand.is_met(entry[1]):
                chosen = entry[1]
                break
            refused.append(entry)
        for entry in refused:
            heapq.heappush(self._ready, entry)
        if chosen is None:
            return None
        del self._missing[chosen]
        if demand is not None:
            if demand.link is not None:
                demand.link.reserved_bytes += demand.nbytes
            if demand.limit is not None and chosen.kind == FORWARD:
                demand.limit.in_flight += 1
        return chosen

    def finish(self, action: Action) -> None:
        """Reports that a computation has ended and that its result was handed to its link."""
        demand = self._demands.pop(action, None)
        if demand is None:
            return
        if demand.link is not None:
            demand.link.reserved_bytes -= demand.nbytes
        if demand.limit is not None and action.kind == BACKWARD:
            demand.limit.in_flight -= 1

    def waiting(self) -> dict[Action, int]:
        """Returns the actions that have not run, with how many others each still waits for."""
        return dict(self._missing)

    def demand(self, action: Action) -> Demand | None:
        """Returns what an action that has not finished needs besides its predecessors."""
        return self._demands.get(action)

    def _push(self, action: Action) -> None:
        """Makes an action ready."""
        self._readied += 1
        heapq.heappush(self._ready, (self._policy(action, self._readied), action))
