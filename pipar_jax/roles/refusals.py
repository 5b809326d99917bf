"""Refusals of unknown peers: reported, but never so many that they fill a disk."""

from __future__ import annotations

import time

from pipar_jax.disk.event_log import OnEvent

#: Number of refusals that are all reported, and the seconds between two reports after them.
FIRST, EVERY_S = 20, 30.0


class Refusals:
    """Counts refusals and reports some of them.

    Args:
      tell: Receives events.
    """

    def __init__(self, tell: OnEvent) -> None:
        self._tell = tell
        self._told_s = 0.0
        self._untold = 0
        self.count = 0

    def add(self, host: str | None, address: str, reason: str) -> None:
        """Records a refusal.

        Args:
          host: The name that the peer gave, if it is the name of a host of the run.
          address: The peer's address.
          reason: Why it was refused, on a single line.
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
        """Reports the total, if some refusals were not reported."""
        if self._untold:
            self._tell({"event": "refusals", "count": self.count})
            self._untold = 0
