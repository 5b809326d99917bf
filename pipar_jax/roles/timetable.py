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
      widest: A round than which none to come has more steps.

    Args:
      epochs: Number of epochs.
      rounds: Number of rounds instead; 0 for as many as the epochs have.
      plan: The plan, which defines when weights are averaged or handed on.
      steps: Steps in an epoch of each device that was present when the run began.
      ends: What ``ends_after`` returned of the part of the run before this one.
    """

    def __init__(
        self,
        epochs: int,
        rounds: int,
        plan: Plan,
        steps: Sequence[int],
        ends: Sequence[Sequence[int]] = (),
    ) -> None:
        self._plan = plan
        self._longest = longest = max(steps)
        by_steps = plan.order == Order.PARALLEL and plan.aggregate_every > 0
        self._every = every = plan.aggregate_every if by_steps else 0
        self._ends = [(one, taken) for one, taken in ends]
        last, taken = max(self._ends, default=(0, 0))
        self.widest, self._total, self.rounds = last, 0, rounds or epochs
        if by_steps:
            self._total = taken + (rounds - last) * every if rounds else longest * epochs
            self.rounds = rounds or last + math.ceil((self._total - taken) / every)

    def steps(self, of_epoch: int) -> int:
        """Returns the steps of a device in the whole run, if it takes part in all rounds.

        Args:
          of_epoch: Steps in its epoch.
        """
        return self._total if self._every else self.rounds * of_epoch

    def epochs(self, rounds: int) -> float:
        """Returns how often the first rounds pass over the samples of the largest device.

        Args:
          rounds: Number of rounds.
        """
        return self._over(rounds) / self._longest if self._every else float(rounds)

    def length(self, index: int, of_epoch: int) -> int:
        """Returns the steps of a device in a round."""
        return self._over(index + 1) - self._over(index) if self._every else of_epoch

    def ends_after(self, rounds: int) -> list[list[int]]:
        """Returns which of the first rounds were shorter than others, for the rounds that follow.

        The last round of a run may be shorter. If the run goes on all the same, the next round
        begins where that one has ended, and not where a whole one would have.

        Args:
          rounds: Number of rounds.

        Returns:
          For each shorter round how many rounds are over with it, and how many steps, JSON-ready.
        """
        ends = [one for one in self._ends if one[0] <= rounds]
        last, taken = max(ends, default=(0, 0))
        if (over := self._over(rounds)) < taken + (rounds - last) * self._every:
            ends.append((rounds, over))
        return [list(one) for one in ends]

    def _over(self, rounds: int) -> int:
        """Returns the steps in the first rounds, where a round is a number of steps."""
        last, taken = max((one for one in self._ends if one[0] <= rounds), default=(0, 0))
        most = min((steps for one, steps in self._ends if one > rounds), default=self._total)
        return min(taken + (rounds - last) * self._every, most)

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
