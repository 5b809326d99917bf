"""When a round is over: all have finished, or as many as the configuration asks for.

It is a value of times and sets, without links or threads: who asks says who has finished, who is
lost and what time it is.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from pipar_jax.config import Config


class Verdict(enum.Enum):
    """What is to be done with a round now."""

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
      config: Resolved configuration: ``cohort.quorum``, ``deadline_s``, ``first``, ``below`` and
        ``wait_s``.
      cohort: The round's devices.
      now_s: When the round begins, on the monotonic clock.
    """

    def __init__(self, config: Config, cohort: Sequence[int], now_s: float) -> None:
        self._config = config.cohort
        self._began_s = now_s
        self.cohort = tuple(cohort)
        self.done: set[int] = set()
        self.lost: set[int] = set()

    @property
    def needed(self) -> int:
        """How many devices have to finish."""
        return needed(self._config.quorum or self._config.first, self.cohort)

    @property
    def remaining(self) -> tuple[int, ...]:
        """The devices that are not lost, in the cohort's order."""
        return tuple(one for one in self.cohort if one not in self.lost)

    def ends_s(self) -> float | None:
        """Returns when the verdict may change though nothing happens, or None."""
        if not self._config.deadline_s:
            return None
        deadline_s = self._began_s + self._config.deadline_s
        return deadline_s + (self._config.wait_s if self._config.below == "wait" else 0.0)

    def verdict(self, now_s: float) -> Verdict:
        """Returns what is to be done now.

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
    """Returns how many devices of a cohort have to finish; all of them where no quorum is set."""
    return quorum or max(1, len(cohort))
