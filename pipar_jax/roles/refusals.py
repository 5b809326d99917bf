"""What was refused from strangers: told, but never so much that it fills a disk."""

from __future__ import annotations

import time

from pipar_jax.disk.event_log import OnEvent

#: Refusals that are told one by one, and the seconds between two that are told after them.
FIRST, EVERY_S = 20, 30.0


class Refusals:
    """Counts refusals and tells of some of them.

    Args:
      tell: Takes events.
    """

    def __init__(self, tell: OnEvent) -> None:
        self._tell = tell
        self._told_s = 0.0
        self._untold = 0
        self.count = 0

    def add(self, host: str | None, address: str, reason: str) -> None:
        """Takes note of one.

        Args:
          host: The name that it gave, if it is one of the run's.
          address: Where it came from.
          reason: Why it was refused; one line.
        """
        self.count += 1
        now = time.monotonic()
        if self.count > FIRST and now - self._told_s < EVERY_S:
            self._untold += 1
            return
        untold, self._untold, self._told_s = self._untold, 0, now
        self._tell(
            {"event": "refused", "host": host, "address": address, "reason": reason,
             "untold": untold}
        )  # fmt: skip

    def close(self) -> None:
        """Tells how many there were, if some were not told."""
        if self._untold:
            self._tell({"event": "refusals", "count": self.count})
            self._untold = 0
