"""Passes the actions of a round to a host's dispatcher, step by step."""

from __future__ import annotations

import collections
from collections.abc import Callable

from pipar_jax.schedule.actions import ALL, Action, Span
from pipar_jax.schedule.dispatch import Demand, Dispatcher, Row
from pipar_jax.schedule.host_program import HostProgram, Operation
from pipar_jax.schedule.plan import Order
from pipar_jax.schedule.rounds import RoundSchedule

#: Returns the conditions of an operation on a number of samples, in addition to predecessors.
Demands = Callable[[Operation, int], Demand | None]


class StepFeeder:
    """Iterates over the spans of a round and supplies the dispatcher with the next step.

    Parallel spans advance independently, each as soon as its step has been dispatched on this host;
    sequential spans follow one another.

    Attributes:
      schedule: The current round.
      turn: In sequential order, place and first step of the current turn.

    Args:
      program: The plan compiled for the host.
      dispatcher: Receives the host's actions.
      demands: Conditions of operations in addition to their predecessors; None if there are none.
    """

    def __init__(
        self, program: HostProgram, dispatcher: Dispatcher, demands: Demands | None = None
    ) -> None:
        self._program, self._dispatcher, self._demands = program, dispatcher, demands
        self.schedule = RoundSchedule(program.plan, (), (), 1)
        self._left: dict[tuple[int, int], int] = {}
        self._position: dict[tuple[int, int], int] = {}
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._queue: collections.deque[int] = collections.deque()
        self._skipped: set[int] = set()
        self.turn = (ALL, 0)
        self._spans: list[Span] = []
        self._open = 0
        # Updates of shared weights: the predecessors named so far, and the number of devices whose
        # step is missing. They are kept until they are dispatched.
        self._joint: dict[Action, dict[Action, None]] = {}
        self._joint_left: dict[Action, int] = {}
        # The conditions of each operation, by the size of its micro-batch.
        self._needs: dict[tuple[int, int, str], dict[int, Demand | None]] = {}

    def start(self, schedule: RoundSchedule) -> None:
        """Begins a round."""
        self.schedule = schedule
        self._position.clear()
        mine = [
            position
            for position, span in enumerate(schedule.spans)
            if self._program.takes_part(span.device) and span.stop > span.first
        ]
        self._open, self._spans = len(mine), [schedule.spans[position] for position in mine]
        self._queue.clear()
        self._skipped.clear()
        self._needs.clear()  # a device may have come back over another link
        if self._program.plan.order == Order.SEQUENTIAL:
            self._queue.extend(mine[1:])
            mine = mine[:1]
        for position in mine:
            self._add(position, schedule.spans[position].first)

    def drop(self, place: int, step: int) -> None:
        """Takes a place out of the round from a step on; the dispatcher has to forget it too.

        Args:
          place: The place, whose stages are no longer worked on.
          step: Its first step that does not count.
        """
        spans = self.schedule.spans
        for position in [waiting for waiting in self._queue if spans[waiting].device == place]:
            if spans[position].first >= step:
                self._queue.remove(position)
                self._skipped.add(position)
                self._open -= 1
        for key in [left for left in self._left if left[0] == place and left[1] >= step]:
            position = self._position.pop(key)
            del self._left[key], self._sizes[key]
            self._skipped.add(position)
            self._open -= 1
            self._follow()

    @property
    def finished(self) -> bool:
        """Whether all actions of the round were dispatched on this host."""
        return self._open == 0 and not self._joint_left

    def sizes(self, device: int, step: int) -> tuple[int, ...]:
        """Returns the micro-batch sizes of a device's current step on this host."""
        return self._sizes[device, step]

    def under_way(self) -> dict[tuple[int, int], int]:
        """Returns the remaining actions of every current (device, step)."""
        return self._left

    def dispatched(self, action: Action) -> None:
        """Reports a dispatched action."""
        self._dispatcher.complete(action)
        if action.device == ALL:
            del self._joint_left[action]
            self._dispatcher.drop_step(ALL, action.step - 2)
            return
        key = action.device, action.step
        self._left[key] -= 1
        if self._left[key]:
            return
        del self._left[key], self._sizes[key]
        # No action waits for earlier steps any more.
        self._dispatcher.drop_step(action.device, action.step - 1)
        self._advance(self._position.pop(key), action.step)

    def _advance(self, position: int, step: int) -> None:
        """Adds the step after a finished one: the span's next, or the next span's first."""
        if step + 1 < self.schedule.spans[position].stop:
            self._add(position, step + 1)
            return
        self._open -= 1
        self._follow()

    def _follow(self) -> None:
        """Adds the first step of the next span, in sequential order, if there is one."""
        if self._queue:
            following = self._queue.popleft()
            self._add(following, self.schedule.spans[following].first)

    def _add(self, position: int, step: int) -> None:
        """Passes this host's actions of a step to the dispatcher."""
        span, rows = self.schedule.spans[position], list[Row]()
        place = span.device
        key = place, step
        sizes = self._sizes[key] = self.schedule.sizes(place, step)
        self._position[key] = position
        if step == span.first and self.schedule.opens(position):
            self.turn = place, step
        alone = position - 1 in self._skipped
        for action, before in self._program.step(self.schedule, position, step, alone=alone):
            if action.device == ALL:
                self._join(action, before)
            elif self._demands is None:
                rows.append((action, before, None))
            else:
                rows.append((action, before, self._need(action, sizes)))
        self._left[key] = len(rows)
        self._dispatcher.add(rows)

    def _need(self, action: Action, sizes: tuple[int, ...]) -> Demand | None:
        """Returns the conditions of an action in addition to its predecessors."""
        key = action.device, action.stage, action.kind
        known = self._needs.setdefault(key, {})
        samples = sizes[action.micro_batch]
        if samples not in known:
            assert self._demands is not None
            known[samples] = self._demands(self._program.operation(*key), samples)
        return known[samples]

    def _join(self, action: Action, before: tuple[Action, ...]) -> None:
        """Adds an action that serves all devices once every device's step has been added."""
        parts = self._joint.setdefault(action, {})
        parts.update(dict.fromkeys(before))
        if action not in self._joint_left:
            self._joint_left[action] = sum(
                span.first <= action.step < span.stop for span in self._spans
            )
        self._joint_left[action] -= 1
        if not self._joint_left[action]:
            self._dispatcher.add([(action, tuple(self._joint.pop(action)), None)])
