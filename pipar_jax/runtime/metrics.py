"""Loss, metrics and samples of the steps whose last stage runs on this host."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from stages.stage_programs import Metrics
from stages.tasks.task import LOSS

#: For each metric of a task the sum of its numerators, and that of its denominators.
Sums = Mapping[str, tuple[float, float]]
_NOTHING: Sums = MappingProxyType({})


class Totals(NamedTuple):
    """Sums over samples.

    Attributes:
      loss: Sum of the samples' losses.
      samples: Number of samples.
      metrics: Sums of each metric.
    """

    loss: float = 0.0
    samples: int = 0
    metrics: Sums = _NOTHING

    def plus(self, other: Totals) -> Totals:
        """Returns the sums over both."""
        metrics = dict(self.metrics)
        for name, (value, weight) in other.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = before[0] + value, before[1] + weight
        return Totals(self.loss + other.loss, self.samples + other.samples, metrics)


def totals_of(metrics: Metrics, samples: int) -> Totals:
    """Returns the sums over a micro-batch as Python's numbers.

    Args:
      metrics: What the last stage computed.
      samples: Samples in the micro-batch.
    """
    sums = {}
    for name, pair in metrics.items():
        if name != LOSS:
            value, weight = np.asarray(pair).tolist()
            sums[name] = value, weight
    return Totals(float(metrics[LOSS]), samples, sums)


class Meter:
    """Collects the measurements of the last stage and reports them periodically.

    Args:
      tell: Receives device, step and totals of a step.
      every_s: Least seconds between two reports.
      broken: Receives device and step of each device's first non-finite loss in a round.
    """

    def __init__(
        self,
        tell: Callable[[int, int, Totals], None],
        every_s: float,
        broken: Callable[[int, int], None],
    ) -> None:
        self._tell, self._every_s, self._broken = tell, every_s, broken
        self._told_broken: set[int] = set()
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, int], Totals] = {}
        # Measurements of completed steps: those that cannot be undone, and for each device its
        # turn's or round's so far without the last two steps, and those of these two.
        self._round = Totals()
        self._over: dict[int, Totals] = {}
        self._last: dict[int, list[tuple[int, Totals]]] = {}
        self._told_s = 0.0

    def add(self, device: int, step: int, totals: Totals) -> None:
        """Adds a micro-batch."""
        if not math.isfinite(totals.loss) and device not in self._told_broken:
            self._told_broken.add(device)
            self._broken(device, step)
        with self._lock:
            self._steps[device, step] = self._steps.get((device, step), Totals()).plus(totals)

    def step_over(self, device: int, step: int) -> None:
        """Closes a device's step and reports it if a report is due."""
        with self._lock:
            totals = self._steps.pop((device, step), None)
            if totals is not None:
                self._close(device, keep=1)
                self._last.setdefault(device, []).append((step, totals))
            now = time.monotonic()
            if totals is None or not totals.samples or now - self._told_s < self._every_s:
                return
            self._told_s = now
        self._tell(device, step, totals)

    def take_round(self) -> Totals:
        """Returns and resets the round's sums."""
        with self._lock:
            self._settle()
            totals, self._round = self._round, Totals()
            self._told_broken.clear()
        return totals

    def settle(self) -> None:
        """Records that the steps so far cannot be undone."""
        with self._lock:
            self._settle()

    def forget(self, device: int) -> None:
        """Removes a device's steps since ``settle`` or the round's start from the round."""
        with self._lock:
            for key in [one for one in self._steps if one[0] == device]:
                del self._steps[key]
            self._last.pop(device, None)
            self._over.pop(device, None)
            self._told_broken.discard(device)

    def is_broken(self, device: int) -> bool:
        """Returns whether a loss of a device was not finite in the round."""
        return device in self._told_broken

    def rewind(self, step: int) -> None:
        """Removes every device's steps from ``step``, one of the last two, from the round."""
        with self._lock:
            for key in [one for one in self._steps if one[1] >= step]:
                del self._steps[key]
            for device, last in self._last.items():
                self._last[device] = [one for one in last if one[0] < step]
            self._told_broken.clear()  # what follows is computed anew

    def _settle(self) -> None:
        for device in sorted(self._last):
            self._close(device)
        for device in sorted(self._over):
            self._round = self._round.plus(self._over[device])
        self._over.clear()

    def _close(self, device: int, keep: int = 0) -> None:
        """Adds a device's last steps, but for so many, to the steps before them."""
        last = self._last.get(device, [])
        while len(last) > keep:
            _, totals = last.pop(0)
            self._over[device] = self._over.get(device, Totals()).plus(totals)
