"""To what a host's mini-batches are padded: its own, or as the tensors of others tell."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class StepLengths:
    """The lengths that the mini-batch of a place's step may be padded to.

    Who has the samples knows it; others learn it from the shapes that arrive, and all that belongs
    to a step has to be of one length. Where nothing that crosses varies with the length, several
    are left, and nothing behind depends on it. Any thread may call it.

    Args:
      lengths: What mini-batches are padded to, rising; none: all samples are equally long.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._all = tuple(lengths)
        self._lock = threading.Lock()
        self._attempt = 0
        self._known: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def note(self, attempt: int, place: int, step: int, lengths: Sequence[int]) -> None:
        """Notes which lengths a step of an attempt at a round may have."""
        if not self._all:
            return
        with self._lock:
            if attempt > self._attempt:  # what is left of the one before may still be computed
                kept = {key: one for key, one in self._known.items() if key[0] == attempt - 1}
                self._attempt, self._known = attempt, kept
            self._known[attempt, place, step] = tuple(lengths)

    def possible(self, attempt: int, place: int, step: int) -> tuple[int, ...] | None:
        """Returns which lengths a step may have; None if nothing is known of it yet."""
        return self._known.get((attempt, place, step))

    def of(self, attempt: int, place: int, step: int) -> int | None:
        """Returns the length by which a step is computed; None if samples are equally long."""
        known = self._known.get((attempt, place, step), self._all[-1:])
        return known[0] if self._all else None
