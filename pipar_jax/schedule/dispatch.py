"""Which of a host's ready actions runs next: the one policy with two drivers.

The runtime drives a ``Dispatcher`` with compiled stages and sockets, the simulator with durations.
Both tell it what was added, what is over and what a link will take, and ask for the next action.
An action is *ready* when everything before it is over and the link that its result leaves by has
credit for it; the dispatch thread therefore never blocks on a link, and a slow link delays nobody
but its own device.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import BACKWARD, COMPUTE, FORWARD, HAND_ON, LAST, UPDATE, Action
from pipar_jax.schedule.plan import Dispatch

#: Kinds that the dispatcher hands out; sends follow from them and receives are reported to it.
DISPATCHED = COMPUTE | {HAND_ON}

#: A sort key; the smallest runs first. The second argument counts how many became ready before.
Key = tuple[float, ...]
Policy = Callable[[Action, int], Key]


class Outlet(Protocol):
    """What a dispatcher knows of a link: how many more bytes it takes."""

    def can_send(self, nbytes: int) -> bool:
        """Says whether the link takes a result of this size now."""


def policy(name: Dispatch, demand: Mapping[int, float] | None = None) -> Policy:
    """Returns the policy of a name.

    Args:
      name: ``fcfs`` runs what became ready first. ``backward_first`` prefers updates and
        backwards, which free residuals and let devices go on. ``slowest_first`` serves the device
        with the longest demand first (the priority of PipeSFL). ``fixed`` runs a step's forwards
        in micro-batch order, then its backwards, devices in order, whatever arrives first.
      demand: For ``slowest_first``, seconds of work per step of each device.

    Raises:
      PlanError: There is no policy of this name.
    """
    if name == "fcfs":
        return lambda action, ready: (ready,)
    if name == "backward_first":
        urgency = {UPDATE: 0, BACKWARD: 1, LAST: 1}
        return lambda action, ready: (urgency.get(action.kind, 2), ready)
    if name == "slowest_first":
        times = {} if demand is None else demand  # looked up when used: it may change
        return lambda action, ready: (-times.get(action.device, 0.0), ready)
    if name == "fixed":
        phase = {FORWARD: 0, LAST: 0, BACKWARD: 1}
        return lambda action, ready: (
            action.step, phase.get(action.kind, 2), action.micro_batch, action.device, ready,
        )  # fmt: skip
    raise PlanError(
        f"there is no dispatch policy {name!r}: use fcfs, backward_first, slowest_first or fixed"
    )


class Gate:
    """How many micro-batches a stage with shared weights holds between forward and backward.

    Attributes:
      inside: Micro-batches between their forward and their backward.
      most: How many there may be.
    """

    __slots__ = ("inside", "most")

    def __init__(self, most: int) -> None:
        self.inside = 0
        self.most = most


class GatedOutlet:
    """A gate and the link behind it: a forward needs room in both.

    Args:
      gate: The gate.
      beyond: The link that the forward's result leaves by, if it leaves.
    """

    __slots__ = ("_beyond", "_gate")

    def __init__(self, gate: Gate, beyond: Outlet | None) -> None:
        self._gate, self._beyond = gate, beyond

    def can_send(self, nbytes: int) -> bool:
        """Says whether the gate lets one more in and the link takes its result."""
        return self._gate.inside < self._gate.most and (
            self._beyond is None or self._beyond.can_send(nbytes)
        )


class Dispatcher:
    """The state of one host's schedule: what waits, what is ready, what comes next.

    Not thread-safe: a host's dispatch thread owns it.

    Args:
      policy: Orders the ready actions.
      outlet: For an action, the link that its result leaves by and the result's size in bytes, or
        None if the result stays on the host.
    """

    def __init__(
        self, policy: Policy, outlet: Callable[[Action], tuple[Outlet, int] | None]
    ) -> None:
        self._policy = policy
        self._outlet = outlet
        self._missing: dict[Action, int] = {}
        self._dependents: dict[Action, list[Action]] = {}
        self._ready: list[tuple[Key, Action]] = []
        self._over: dict[tuple[int, int], set[Action]] = {}
        self._readied = 0

    def add(self, rows: Iterable[tuple[Action, tuple[Action, ...]]]) -> None:
        """Adds this host's actions of a step, each with what must be over before it.

        Only kinds in ``DISPATCHED`` are handed out later; the rest need no entry. What is waited
        for may be over already, also before it was added (a peer may be ahead).
        """
        for action, before in rows:
            if action.kind not in DISPATCHED:
                continue
            missing = 0
            for one in before:
                if one not in self._over.get((one.device, one.step), ()):
                    self._dependents.setdefault(one, []).append(action)
                    missing += 1
            self._missing[action] = missing
            if not missing:
                self._push(action)

    def over(self, action: Action) -> None:
        """Reports that an action is over (a computation dispatched, a receive complete)."""
        self._over.setdefault((action.device, action.step), set()).add(action)
        for dependent in self._dependents.pop(action, ()):
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                self._push(dependent)

    def forget(self, device: int, step: int) -> None:
        """Drops what is known of a device's finished step; nothing later may wait for it."""
        self._over.pop((device, step), None)

    def next(self) -> Action | None:
        """Returns the ready action to run now, or None if none is ready and has credit."""
        refused: list[tuple[Key, Action]] = []
        chosen = None
        while self._ready:
            entry = heapq.heappop(self._ready)
            outlet = self._outlet(entry[1])
            if outlet is None or outlet[0].can_send(outlet[1]):
                chosen = entry[1]
                break
            refused.append(entry)
        for entry in refused:
            heapq.heappush(self._ready, entry)
        if chosen is not None:
            del self._missing[chosen]
        return chosen

    def waiting(self) -> dict[Action, int]:
        """Returns the actions that have not run, with how many others each still waits for."""
        return dict(self._missing)

    def _push(self, action: Action) -> None:
        """Makes an action ready."""
        self._readied += 1
        heapq.heappush(self._ready, (self._policy(action, self._readied), action))
