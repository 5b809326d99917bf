"""Loss, accuracy and samples of the steps whose last stage runs on this host."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class Totals(NamedTuple):
    """Sums over samples.

    Attributes:
      loss: Sum of the samples' losses.
      correct: Samples whose largest logit is the label's.
      samples: How many there were.
    """

    loss: float = 0.0
    correct: float = 0.0
    samples: int = 0

    def plus(self, other: Totals) -> Totals:
        """Returns the sums over both."""
        return Totals(
            self.loss + other.loss, self.correct + other.correct, self.samples + other.samples
        )


class Meter:
    """Collects what the last stage measures and tells of it now and then.

    Args:
      tell: Takes device, step, mean loss and accuracy.
      every_s: Seconds that must lie between two messages.
      broken: Takes device and step of the first loss of each device in a round that is not finite.
    """

    def __init__(
        self,
        tell: Callable[[int, int, float, float], None],
        every_s: float,
        broken: Callable[[int, int], None],
    ) -> None:
        self._tell, self._every_s, self._broken = tell, every_s, broken
        self._told_broken: set[int] = set()
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, int], Totals] = {}
        # What the steps that are over measured: what cannot be undone, and of each device its
        # turn's or round's so far without the last step, and that one.
        self._round = Totals()
        self._over: dict[int, Totals] = {}
        self._last: dict[int, tuple[int, Totals]] = {}
        self._told_s = 0.0

    def add(self, device: int, step: int, loss: float, correct: float, samples: int) -> None:
        """Adds a micro-batch."""
        one = Totals(loss, correct, samples)
        if not math.isfinite(loss) and device not in self._told_broken:
            self._told_broken.add(device)
            self._broken(device, step)
        with self._lock:
            self._steps[device, step] = self._steps.get((device, step), Totals()).plus(one)

    def step_over(self, device: int, step: int) -> None:
        """Closes a device's step and tells of it if the last message is long ago."""
        with self._lock:
            totals = self._steps.pop((device, step), None)
            if totals is not None:
                self._close(device)
                self._last[device] = step, totals
            now = time.monotonic()
            if totals is None or not totals.samples or now - self._told_s < self._every_s:
                return
            self._told_s = now
        self._tell(device, step, totals.loss / totals.samples, totals.correct / totals.samples)

    def take_round(self) -> Totals:
        """Returns the round's sums and starts over."""
        with self._lock:
            self._settle()
            totals, self._round = self._round, Totals()
            self._told_broken.clear()
        return totals

    def settle(self) -> None:
        """Notes that what is over so far is not undone any more."""
        with self._lock:
            self._settle()

    def forget(self, device: int) -> None:
        """Takes what a device did since ``settle`` or the round's start out of the round."""
        with self._lock:
            for key in [one for one in self._steps if one[0] == device]:
                del self._steps[key]
            self._last.pop(device, None)
            self._over.pop(device, None)
            self._told_broken.discard(device)

    def rewind(self, step: int) -> None:
        """Takes every device's steps from one on out of the round; it is the last that is over."""
        with self._lock:
            for key in [one for one in self._steps if one[1] >= step]:
                del self._steps[key]
            for device in [one for one, (last, _) in self._last.items() if last >= step]:
                del self._last[device]

    def _settle(self) -> None:
        for device in sorted(self._last):
            self._close(device)
        for device in sorted(self._over):
            self._round = self._round.plus(self._over[device])
        self._over.clear()

    def _close(self, device: int) -> None:
        """Adds the device's last step that is over to those before it."""
        if device in self._last:
            _, totals = self._last.pop(device)
            self._over[device] = self._over.get(device, Totals()).plus(totals)
