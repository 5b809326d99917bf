"""Durations of a host's computations since the last query."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict

from pipar_jax.protocol.values import Seen
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, ActionKind
from pipar_jax.schedule.trace import Timed

_KINDS = (FORWARD, BACKWARD, LOSS, UPDATE)


class Observer:
    """Collects the times of one host's computations; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[tuple[int, int, ActionKind, int], list[float]] = defaultdict(list)

    def add(self, row: Timed) -> None:
        """Records a timed action; actions that are not computations are ignored."""
        one = row.action
        if one.kind in _KINDS:
            with self._lock:
                key = one.device, one.stage, one.kind, row.samples
                self._times[key].append(row.end_s - row.start_s)

    def take(self) -> list[Seen]:
        """Returns the durations recorded since the last call."""
        with self._lock:
            times, self._times = self._times, defaultdict(list)
        return [
            Seen(*key, len(values), statistics.median(values))
            for key, values in sorted(times.items())
        ]
