"""A simulated round: the feeders of all hosts, and their common state."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from pipar_jax.schedule.actions import Action
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.step_feeder import StepFeeder
from pipar_jax.schedule.steps import update_of


class SimulatedRound:
    """The feeders of all hosts in one round, which can be shortened while it runs.

    Attributes:
      schedule: The round; ``leave_out`` shortens it.
      last_updates: The updates that end the devices' spans (parallel order).

    Args:
      schedule: The round.
      feeders: The feeders by host.
    """

    def __init__(self, schedule: RoundSchedule, feeders: Mapping[str, StepFeeder]) -> None:
        self.schedule = schedule
        self._feeders = feeders
        self._left_out: dict[int, int] = {}
        self.last_updates = _last_updates(schedule)

    @property
    def finished(self) -> bool:
        """Whether all actions of all hosts were dispatched."""
        return all(feeder.finished for feeder in self._feeders.values())

    def reached(self) -> dict[int, int]:
        """Returns the latest started step on any host for each device that still trains."""
        steps: dict[int, int] = {}
        for feeder in self._feeders.values():
            for device, step in feeder.under_way():
                steps[device] = max(step, steps.get(device, step))
        return steps

    def begun(self) -> list[tuple[str, int, int, int, tuple[int, ...]]]:
        """Returns host, device, step, remaining actions and sizes of every current step."""
        return sorted(
            (host, *key, left, feeder.sizes(*key))
            for host, feeder in self._feeders.items()
            for key, left in feeder.under_way().items()
        )

    def alike_ahead(self, reached: Mapping[int, int]) -> int:
        """Returns the number of further steps in which all mini-batches keep their current sizes.

        Args:
          reached: Result of ``reached``.
        """
        least = 1 << 60
        for span in self.schedule.spans:
            step = reached.get(span.device)
            if step is None:
                continue
            samples, batch_size = self.schedule.samples[span.device], self.schedule.batch_size
            stop = span.stop
            if samples % batch_size:  # an epoch ends with a smaller mini-batch
                per_epoch = -(-samples // batch_size)
                done = (step + self._left_out.get(span.device, 0)) % per_epoch
                stop = min(stop, step + per_epoch - 1 - done)
            least = min(least, stop - 1 - step)
        return least

    def leave_out(self, steps: int, devices: Collection[int]) -> None:
        """Shortens the spans of devices by repeated steps."""
        for device in devices:
            self._left_out[device] = self._left_out.get(device, 0) + steps
        was = self.schedule
        spans = tuple(
            span._replace(stop=span.stop - steps) if span.device in devices else span
            for span in was.spans
        )
        self.schedule = _Shortened(
            was.plan, spans, was.samples, was.batch_size, was.holder, dict(self._left_out)
        )
        for feeder in self._feeders.values():
            feeder.schedule = self.schedule
        self.last_updates = _last_updates(self.schedule)


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
    """A round without some middle steps; later steps keep their sizes.

    Attributes:
      left_out: Number of steps left out by device.
    """

    left_out: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def sizes(self, device: int, step: int) -> tuple[int, ...]:
        """Returns the micro-batch sizes of a device's step."""
        return super().sizes(device, step + self.left_out.get(device, 0))
