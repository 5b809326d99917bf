"""What a host has to do in a round, handed to its dispatcher a step at a time."""

from __future__ import annotations

from collections.abc import Callable

from pipar_jax.schedule.actions import ALL, Action, RoundSchedule, host_of
from pipar_jax.schedule.dispatch import DISPATCHED, Dispatcher
from pipar_jax.schedule.plan import Plan


class Agenda:
    """Walks through a round's spans and keeps the dispatcher supplied with the next step.

    Parallel spans advance side by side, each as soon as its step has been dispatched here;
    sequential ones follow one another.

    Args:
      host: The host's name.
      plan: The run's plan.
      dispatcher: Given the host's actions.
      takes_part: Says whether the host runs a stage of a device.
    """

    def __init__(
        self,
        host: str,
        plan: Plan,
        dispatcher: Dispatcher,
        takes_part: Callable[[int], bool],
    ) -> None:
        self._takes_part = takes_part
        self._host = host
        self._plan = plan
        self._dispatcher = dispatcher
        self._schedule: RoundSchedule | None = None
        self._left: dict[tuple[int, int], int] = {}
        self._position: dict[tuple[int, int], int] = {}
        self._queue: list[int] = []
        self._open = 0
        self._sharers = 0
        # Updates of shared weights: what every device's step has named so far, and how many
        # devices' steps are missing. They stay until they were dispatched.
        self._joint: dict[Action, dict[Action, None]] = {}
        self._joint_left: dict[Action, int] = {}

    def start(self, schedule: RoundSchedule) -> None:
        """Begins a round."""
        self._schedule = schedule
        self._position.clear()
        mine = [
            position
            for position, span in enumerate(schedule.spans)
            if self._takes_part(span.device) and span.stop > span.first
        ]
        self._open = self._sharers = len(mine)
        if self._plan.order == "sequential":
            self._queue = mine[1:]
            mine = mine[:1]
        for position in mine:
            self._add(position, schedule.spans[position].first)

    @property
    def finished(self) -> bool:
        """Whether every action of the round was dispatched on this host."""
        return self._open == 0 and not self._joint_left

    def over(self, action: Action) -> None:
        """Reports an action that was dispatched (or a receive that is complete)."""
        self._dispatcher.over(action)
        if action.kind not in DISPATCHED:
            return
        if action.device == ALL:
            del self._joint_left[action]
            self._dispatcher.forget(ALL, action.step - 2)
            return
        key = action.device, action.step
        self._left[key] -= 1
        if self._left[key]:
            return
        del self._left[key]
        # Nothing waits for actions before this step's any more.
        self._dispatcher.forget(action.device, action.step - 1)
        self._advance(self._position.pop(key), action.step)

    def _advance(self, position: int, step: int) -> None:
        """Adds what comes after a finished step: the span's next, or the next span's first."""
        assert self._schedule is not None
        span = self._schedule.spans[position]
        if step + 1 < span.stop:
            self._add(position, step + 1)
            return
        self._open -= 1
        if self._queue:
            position = self._queue.pop(0)
            self._add(position, self._schedule.spans[position].first)

    def _add(self, position: int, step: int) -> None:
        """Hands this host's actions of a step to the dispatcher."""
        assert self._schedule is not None
        rows = [
            row
            for row in self._schedule.step(position, step)
            if row[0].kind in DISPATCHED and host_of(self._plan, row[0]) == self._host
        ]
        own = [row for row in rows if row[0].device != ALL]
        key = self._schedule.spans[position].device, step
        self._left[key] = len(own)
        self._position[key] = position
        self._dispatcher.add(own)
        for action, before in rows:
            if action.device == ALL:
                self._join(action, before)

    def _join(self, action: Action, before: tuple[Action, ...]) -> None:
        """Adds an action that serves all devices once every device's step has named its part."""
        parts = self._joint.setdefault(action, {})
        parts.update(dict.fromkeys(before))
        self._joint_left[action] = self._joint_left.get(action, self._sharers) - 1
        if not self._joint_left[action]:
            self._dispatcher.add([(action, tuple(self._joint.pop(action)))])
