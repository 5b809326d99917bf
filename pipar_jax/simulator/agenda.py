"""What each host has to do in a simulated round, handed to the dispatchers a step at a time.

It follows the rules of the runtime's agenda: parallel spans advance side by side on each host, a
host gets a device's next step once it has dispatched the one before, and sequential spans follow
one another. One object serves all hosts, so that a step's actions are made once.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping

from pipar_jax.errors import ScheduleError
from pipar_jax.schedule.actions import ALL, Action, RoundSchedule, Span, host_of, update_of
from pipar_jax.schedule.dispatch import DISPATCHED, Dispatcher

Row = tuple[Action, tuple[Action, ...]]


class Agenda:
    """Walks through a round's spans and keeps all dispatchers supplied.

    Attributes:
      schedule: The round; ``leave_out`` shortens it.
      last_updates: The updates that end the devices' spans (parallel order).
      open: For each host, how many spans it still works on or has yet to begin.

    Args:
      schedule: The round.
      dispatchers: For each host its dispatcher.
    """

    def __init__(self, schedule: RoundSchedule, dispatchers: Mapping[str, Dispatcher]) -> None:
        self.schedule = schedule
        self._dispatchers = dispatchers
        self._left_out: dict[int, int] = {}
        self.last_updates = _last_updates(schedule)
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._made: dict[tuple[int, int], dict[str, list[Row]]] = {}
        self._takers: dict[tuple[int, int], int] = {}
        self._left: dict[tuple[str, int, int], int] = {}
        self._position: dict[tuple[str, int, int], int] = {}
        self._joint: dict[tuple[str, Action], dict[Action, None]] = {}
        self._joint_left: dict[tuple[str, Action], int] = {}
        self._queues: dict[str, collections.deque[int]] = {}
        self.open: dict[str, int] = dict.fromkeys(dispatchers, 0)
        plan = schedule.plan
        self._hosts = [
            tuple(dict.fromkeys(plan.host(d, s) for s in range(one.stages)))
            for d, one in enumerate(plan.devices)
        ]
        self._sharers = collections.Counter(
            (host, stage)
            for span in self.schedule.spans
            if span.stop > span.first
            for stage in range(plan.devices[span.device].stages)
            for host in [plan.host(span.device, stage)]
        )

    def start(self, host: str) -> None:
        """Gives a host its first actions of the round."""
        mine = [
            position
            for position, span in enumerate(self.schedule.spans)
            if host in self._hosts[span.device] and span.stop > span.first
        ]
        self.open[host] = len(mine)
        if self.schedule.plan.order == "sequential":
            self._queues[host] = collections.deque(mine[1:])
            mine = mine[:1]
        for position in mine:
            self._add(host, position, self.schedule.spans[position].first)

    @property
    def finished(self) -> bool:
        """Whether every action of every host was dispatched."""
        return not any(self.open.values())

    def sizes(self, device: int, step: int) -> tuple[int, ...]:
        """Returns the micro-batch sizes of a device's step that is under way."""
        found = self._sizes.get((device, step))
        if found is None:
            found = self._sizes[device, step] = self.schedule.sizes(device, step)
        return found

    def over(self, host: str, action: Action) -> None:
        """Reports that a host dispatched an action."""
        dispatcher = self._dispatchers[host]
        dispatcher.over(action)
        if action.device == ALL:
            return
        key = host, action.device, action.step
        left = self._left[key] - 1
        if left:
            self._left[key] = left
            return
        del self._left[key]
        # Nothing waits for actions before this step's any more.
        dispatcher.forget(action.device, action.step - 1)
        self._sizes.pop((action.device, action.step - 2), None)
        self._advance(host, self._position.pop(key), action.step)

    def reached(self) -> dict[int, int]:
        """Returns for each device that still trains the furthest step that any host has begun."""
        steps: dict[int, int] = {}
        for _, device, step in self._left:
            steps[device] = max(step, steps.get(device, step))
        return steps

    def begun(self) -> list[tuple[str, int, int, int]]:
        """Returns host, device, step and actions left of every step that is under way."""
        return sorted((*key, left) for key, left in self._left.items())

    def alike_ahead(self, reached: Mapping[int, int]) -> int:
        """Returns for how many further steps all mini-batches keep the sizes they have now.

        Args:
          reached: What ``reached`` returned.
        """
        least = 1 << 60
        for span in self.schedule.spans:
            step = reached.get(span.device)
            if step is None:
                continue
            samples, batch_size = self.schedule.samples[span.device], self.schedule.batch_size
            stop = span.stop
            if samples % batch_size:  # an epoch ends in a smaller mini-batch
                per_epoch = -(-samples // batch_size)
                done = (step + self._left_out.get(span.device, 0)) % per_epoch
                stop = min(stop, step + per_epoch - 1 - done)
            least = min(least, stop - 1 - step)
        return least

    def leave_out(self, steps: int, devices: Collection[int]) -> None:
        """Shortens some devices' spans by steps that would repeat what has been seen."""
        for device in devices:
            self._left_out[device] = self._left_out.get(device, 0) + steps
        self._made.clear()  # what refers to the end of a shortened span changes
        was = self.schedule
        spans = tuple(
            span._replace(stop=span.stop - steps) if span.device in devices else span
            for span in was.spans
        )
        self.schedule = _Shortened(
            was.plan, spans, was.samples, was.batch_size, was.holder, dict(self._left_out)
        )
        self.last_updates = _last_updates(self.schedule)

    def _advance(self, host: str, position: int, step: int) -> None:
        """Adds what comes after a finished step: the span's next, or the next span's first."""
        if step + 1 < self.schedule.spans[position].stop:
            self._add(host, position, step + 1)
            return
        self.open[host] -= 1
        queue = self._queues.get(host)
        if queue:
            following = queue.popleft()
            self._add(host, following, self.schedule.spans[following].first)

    def _add(self, host: str, position: int, step: int) -> None:
        """Hands a host its actions of a step."""
        span = self.schedule.spans[position]
        rows = self._rows(position, span, step).get(host)
        if not rows:
            raise ScheduleError(
                f"{host} takes part in device {span.device}'s chain, but step {step} has no action "
                "for it"
            )
        own = rows
        if any(row[0].device == ALL for row in rows):
            own = [row for row in rows if row[0].device != ALL]
        key = host, span.device, step
        self._left[key] = len(own)
        self._position[key] = position
        dispatcher = self._dispatchers[host]
        dispatcher.add(own)
        if own is not rows:
            for action, before in rows:
                if action.device == ALL:
                    self._join(host, action, before)

    def _join(self, host: str, action: Action, before: tuple[Action, ...]) -> None:
        """Adds an action that serves all devices once every device's step has named its part."""
        key = host, action
        self._joint.setdefault(key, {}).update(dict.fromkeys(before))
        left = self._joint_left.get(key, self._sharers[host, action.stage]) - 1
        if left:
            self._joint_left[key] = left
            return
        self._joint_left.pop(key, None)
        self._dispatchers[host].add([(action, tuple(self._joint.pop(key)))])
        self._dispatchers[host].forget(ALL, action.step - 2)

    def _rows(self, position: int, span: Span, step: int) -> dict[str, list[Row]]:
        """Returns a step's actions by host, made once and dropped when every host has them."""
        key = position, step
        made = self._made.get(key)
        if made is None:
            made = {}
            plan = self.schedule.plan
            chain = [plan.host(span.device, s) for s in range(plan.devices[span.device].stages)]
            for row in self.schedule.step(position, step):
                action = row[0]
                if action.kind in DISPATCHED:
                    plain = action.device == span.device
                    host = chain[action.stage] if plain else host_of(plan, action)
                    made.setdefault(host, []).append(row)
            self._made[key] = made
        takers = self._takers.get(key, len(self._hosts[span.device])) - 1
        self._takers[key] = takers
        if not takers:
            del self._made[key], self._takers[key]
        return made


def _last_updates(schedule: RoundSchedule) -> frozenset[Action]:
    """Returns the update of every stage in the last step of every span."""
    plan = schedule.plan
    return frozenset(
        update_of(plan, span.device, stage, span.stop - 1)
        for span in schedule.spans
        for stage in range(plan.devices[span.device].stages)
    )


@dataclasses.dataclass(frozen=True)
class _Shortened(RoundSchedule):
    """A round without some middle steps, whose later steps keep the sizes that they had.

    Attributes:
      left_out: For each device how many steps were left out before those still to come.
    """

    left_out: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def sizes(self, device: int, step: int) -> tuple[int, ...]:
        """Returns the micro-batch sizes of a device's step."""
        return super().sizes(device, step + self.left_out.get(device, 0))
