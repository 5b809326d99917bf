"""The dispatcher, which chooses the next of a host's ready actions; it has two drivers.

The runtime drives a ``Dispatcher`` with compiled stages and sockets, the simulator with durations.
Both report added actions, completed actions and finished computations to it, and ask for the next
action. An action is *ready* when its predecessors are complete, the link for its result has credit,
and its stage may have one more micro-batch in flight. The dispatch thread therefore never blocks on
a link, and a slow link delays only its own device. Reserved credit and micro-batches in flight are
part of the dispatcher's state, so that a schedule that cannot deadlock in the simulator cannot
deadlock in the runtime.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from pipar_jax.schedule.actions import BACKWARD, COMPUTE, FORWARD, SEND_CLIENT_MODEL, Action
from pipar_jax.schedule.policies import Key, Policy

#: Kinds that are dispatched; sends follow from them, and receives are reported.
DISPATCHED = COMPUTE | {SEND_CLIENT_MODEL}


class OutgoingLink(Protocol):
    """The credit of one direction of a link."""

    @property
    def available_bytes(self) -> float:
        """Bytes that the link accepts before it has to wait."""

    def can_send(self, nbytes: float) -> bool:
        """Returns whether the link accepts a result of this size now."""


class CreditedLink:
    """The credit of a link, less the reservations of results that are being computed.

    Attributes:
      link: The link.
      reserved_bytes: Bytes of results that were dispatched but not yet passed to the link.
    """

    __slots__ = ("link", "reserved_bytes")

    def __init__(self, link: OutgoingLink) -> None:
        self.link = link
        self.reserved_bytes: float = 0

    def can_send(self, nbytes: float) -> bool:
        """Returns whether the link accepts a result of this size now."""
        if not self.reserved_bytes:
            return self.link.can_send(nbytes)
        return self.link.available_bytes >= nbytes + self.reserved_bytes


class InFlightLimit:
    """The limit on micro-batches in flight in a stage with shared weights.

    Attributes:
      in_flight: Micro-batches between their forward and their backward.
      limit: Maximum of ``in_flight``.
    """

    __slots__ = ("in_flight", "limit")

    def __init__(self, limit: int) -> None:
        self.in_flight = 0
        self.limit = limit


class Demand(NamedTuple):
    """The conditions of an action in addition to its predecessors.

    Attributes:
      link: The link for its result; None if the result stays on the host.
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


#: An action, its predecessors, and its other conditions.
Row = tuple[Action, tuple[Action, ...], Demand | None]


class Dispatcher:
    """The schedule of one host: actions that wait, and actions that are ready.

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

        A predecessor may already be complete, even before it was added (a peer may be ahead).

        Args:
          rows: Actions of kinds in ``DISPATCHED``.
        """
        complete, dependents = self._complete, self._dependents
        for action, before, demand in rows:
            missing = 0
            for earlier in before:
                if earlier not in complete.get((earlier.device, earlier.step), ()):
                    dependents.setdefault(earlier, []).append(action)
                    missing += 1
            if demand is not None:
                self._demands[action] = demand
            self._missing[action] = missing
            if not missing:
                self._push(action)

    def complete(self, action: Action) -> None:
        """Reports a completed action: a receive, or a dispatched computation."""
        self._complete.setdefault((action.device, action.step), set()).add(action)
        for dependent in self._dependents.pop(action, ()):
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                self._push(dependent)

    def begin(self, firsts: Mapping[int, int]) -> None:
        """Forgets what was complete of steps that begin anew, after a round that was undone.

        Nothing of the new attempt may have been reported before.

        Args:
          firsts: The first step of each place.
        """
        for place, step in [
            key for key in self._complete if key[0] in firsts and key[1] >= firsts[key[0]]
        ]:
            del self._complete[place, step]

    def drop_step(self, device: int, step: int) -> None:
        """Forgets a finished step of a device; no later action may wait for it."""
        self._complete.pop((device, step), None)

    def forget(self, place: int) -> None:
        """Forgets a place's actions that were not handed out, and what is known of its others.

        One that runs keeps the credit of its link until ``finish``. Nobody else's may wait for
        them, and no limit may count them: of shared weights in parallel a whole step is done anew.
        """
        for action in [missing for missing in self._missing if missing.device == place]:
            del self._missing[action]
            self._demands.pop(action, None)
        self._ready = [entry for entry in self._ready if entry[1].device != place]
        heapq.heapify(self._ready)
        for awaited, waiting in list(self._dependents.items()):
            left = [ready for ready in waiting if ready.device != place]
            if left:
                self._dependents[awaited] = left
            else:
                del self._dependents[awaited]
        for key in [done for done in self._complete if done[0] == place]:
            del self._complete[key]

    def next(self) -> Action | None:
        """Returns the ready action to run now, or None if none may run.

        Credit for its result is reserved on its link until ``finish``; a forward counts as in
        flight until the ``finish`` of its backward.
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
        """Reports that a computation has ended and its result was passed to its link."""
        demand = self._demands.pop(action, None)
        if demand is None:
            return
        if demand.link is not None:
            demand.link.reserved_bytes -= demand.nbytes
        if demand.limit is not None and action.kind == BACKWARD:
            demand.limit.in_flight -= 1

    def waiting(self) -> dict[Action, int]:
        """Returns the actions that have not run, with their numbers of incomplete predecessors."""
        return dict(self._missing)

    def demand(self, action: Action) -> Demand | None:
        """Returns the other conditions of an action that has not finished."""
        return self._demands.get(action)

    def _push(self, action: Action) -> None:
        """Makes an action ready."""
        self._readied += 1
        heapq.heappush(self._ready, (self._policy(action, self._readied), action))
