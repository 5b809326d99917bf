"""When a round is over: all devices have finished, or as many as the configuration requires.

It is a value of times and sets, without links or threads: the caller says who has finished, who is
lost and what the time is.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from pipar_jax.config import CohortConfig


class Verdict(enum.Enum):
    """The decision about a round."""

    WAIT = "wait"
    COMMIT = "commit"
    BELOW = "below the quorum"


class RoundEnd:
    """Decides when a round is over.

    Attributes:
      cohort: The round's devices.
      done: Those that have finished it.
      lost: Those that are out of it.

    Args:
      config: ``quorum``, ``deadline_s``, ``first``, ``below`` and ``wait_s``.
      cohort: The round's devices.
      now_s: When the round begins, on the monotonic clock.
    """

    def __init__(self, config: CohortConfig, cohort: Sequence[int], now_s: float) -> None:
        self._config = config
        self._began_s = now_s
        self.cohort = tuple(cohort)
        self.done: set[int] = set()
        self.lost: set[int] = set()

    @property
    def needed(self) -> int:
        """Number of devices that must finish."""
        return needed(self._config.quorum or self._config.first, self.cohort)

    @property
    def remaining(self) -> tuple[int, ...]:
        """The devices that are not lost, in the cohort's order."""
        return tuple(one for one in self.cohort if one not in self.lost)

    def ends_s(self) -> float | None:
        """Returns when the verdict may change without an event, or None."""
        if not self._config.deadline_s:
            return None
        deadline_s = self._began_s + self._config.deadline_s
        return deadline_s + (self._config.wait_s if self._config.below == "wait" else 0.0)

    def verdict(self, now_s: float) -> Verdict:
        """Returns the decision at a time.

        Args:
          now_s: The time, on the monotonic clock.
        """
        done = len(self.done)
        if len(self.remaining) < self.needed:
            return Verdict.BELOW
        if done == len(self.remaining) or (self._config.first and done >= self._config.first):
            return Verdict.COMMIT
        if not self._config.deadline_s or now_s < self._began_s + self._config.deadline_s:
            return Verdict.WAIT
        if done >= self.needed:
            return Verdict.COMMIT
        end_s = self.ends_s()
        assert end_s is not None
        return Verdict.WAIT if now_s < end_s else Verdict.BELOW


def needed(quorum: int, cohort: Sequence[int]) -> int:
    """Returns how many devices of a cohort must finish: all of them without a quorum."""
    return quorum or max(1, len(cohort))
