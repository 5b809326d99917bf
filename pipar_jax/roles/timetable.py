"""The number of rounds of a run, and the steps of each device in the next round.

Each device has its own steps: a device that was absent resumes where its last counted round ended,
so that its mini-batches depend only on the rounds that it took part in. Where gradients are summed
all devices are at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import HandOn, Order, Plan


class Turn(NamedTuple):
    """A device in a place of a round's cohort.

    Attributes:
      place: The place.
      step: The device's next step.
      steps: Steps in its epoch.
    """

    place: int
    step: int
    steps: int


class Timetable:
    """The rounds of a run under one way to aggregate.

    Attributes:
      rounds: Number of rounds.

    Args:
      epochs: Number of epochs.
      rounds: Number of rounds instead; 0 for as many as the epochs have.
      plan: The plan, which defines when weights are averaged or handed on.
      steps: Steps in an epoch of each device that was present when the run began.
    """

    def __init__(self, epochs: int, rounds: int, plan: Plan, steps: Sequence[int]) -> None:
        self._plan = plan
        self._longest = longest = max(steps)
        every = plan.aggregate_every
        by_steps = plan.order == Order.PARALLEL and every > 0
        per_epochs = math.ceil(longest * epochs / every) if by_steps else epochs
        self.rounds = rounds or per_epochs
        self._total = longest * epochs if by_steps and not rounds else 0
        self._every = every if by_steps else 0

    def steps(self, of_epoch: int) -> int:
        """Returns the steps of a device in the whole run, if it takes part in all rounds.

        Args:
          of_epoch: Steps in its epoch.
        """
        return self._total or self.rounds * (self._every or of_epoch)

    def epochs(self, rounds: int) -> float:
        """Returns how often the first rounds pass over the samples of the largest device.

        Args:
          rounds: Number of rounds.
        """
        if not self._every:
            return float(rounds)
        steps = rounds * self._every
        return (min(steps, self._total) if self._total else steps) / self._longest

    def length(self, index: int, of_epoch: int) -> int:
        """Returns the steps of a device in a round."""
        if not self._every:
            return of_epoch
        if self._total:
            return min(self._every, self._total - index * self._every)
        return self._every

    def spans(self, index: int, turns: Sequence[Turn]) -> tuple[Span, ...]:
        """Returns the spans of a round, in the order of places.

        Args:
          index: The round's number.
          turns: Who takes part.
        """
        if self._plan.order == Order.SEQUENTIAL and self._plan.hand_on == HandOn.STEP:
            longest = max(one.steps for one in turns)
            return tuple(
                Span(one.place, one.step + i, one.step + i + 1)
                for i in range(longest)
                for one in turns
                if i < one.steps
            )
        first = max(one.step for one in turns) if self._plan.sums_gradients else None
        return tuple(
            Span(one.place, step, step + self.length(index, one.steps))
            for one in turns
            for step in [one.step if first is None else first]
        )


def next_steps(spans: Sequence[Span]) -> Mapping[int, int]:
    """Returns the next step in each place after a round."""
    return {span.device: span.stop for span in spans}
