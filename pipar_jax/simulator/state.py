"""The state of a simulated host, which can be compared with an earlier one."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Mapping

from pipar_jax.schedule.actions import Action, ActionKind
from pipar_jax.schedule.dispatch import Dispatcher
from pipar_jax.schedule.step_feeder import StepFeeder
from pipar_jax.schedule.trace import Timed

#: Number of last actions of a host that are kept for the grid of a deadlock.
REMEMBERED = 8
#: Seconds without a computation after which a processor has rested.
REST_S = 2e-3


class ComparableDispatcher(Dispatcher):
    """The runtime's dispatcher, whose state can be compared between two points in time."""

    def state(self, base: Mapping[int, int]) -> Hashable:
        """Returns the state that determines its future, with steps relative to a base.

        Args:
          base: Base step by device; steps of other devices are absolute.
        """

        def moved(action: Action) -> Action:
            return action._replace(step=action.step - base.get(action.device, 0))

        return (
            tuple(moved(action) for _, action in sorted(self._ready)),
            frozenset((moved(action), count) for action, count in self._missing.items()),
            frozenset(
                (moved(action), tuple(moved(dependent) for dependent in dependents))
                for action, dependents in self._dependents.items()
            ),
            frozenset(moved(action) for known in self._complete.values() for action in known),
        )

    def blocked(self) -> dict[Action, list[Action]]:
        """Returns every action that has not run, with what it waits for; nothing if for credit."""
        waiting: dict[Action, list[Action]] = {action: [] for action in self._missing}
        for action, dependents in self._dependents.items():
            for dependent in dependents:
                waiting[dependent].append(action)
        return waiting


class SimulatedHost:
    """One host: what it dispatches from, how far its processor is booked, what it did.

    Attributes:
      name: Its name.
      index: Its place among the hosts.
      dispatcher: Decides what it runs next.
      feeder: Keeps the dispatcher supplied.
      in_flight: Computations dispatched and not over.
      free_s: When the computations dispatched so far are over.
      codec_free_s: When its codec worker is free.
      busy_s: Seconds it computes, for what was dispatched so far.
      warm: Stages and kinds of which it has computed something since it last rested.
      last: The last actions that it dispatched.
      rows: Its timed actions, if they are collected.
    """

    __slots__ = ("busy_s", "codec_free_s", "dispatcher", "feeder", "free_s", "in_flight", "index",
                 "last", "name", "rows", "warm")  # fmt: skip

    def __init__(
        self, name: str, index: int, dispatcher: ComparableDispatcher, feeder: StepFeeder
    ) -> None:
        self.name, self.index, self.dispatcher, self.feeder = name, index, dispatcher, feeder
        self.in_flight = 0
        self.free_s = self.codec_free_s = self.busy_s = 0.0
        self.warm: set[tuple[int, ActionKind]] = set()
        self.last: collections.deque[Action] = collections.deque(maxlen=REMEMBERED)
        self.rows: list[Timed] = []
