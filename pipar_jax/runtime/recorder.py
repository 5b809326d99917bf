"""A cheap record of the actions of a host's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipar_jax.schedule.actions import COMPUTE
from pipar_jax.schedule.trace import Timed, union_s


class Recorder:
    """Timed actions of a host on its own monotonic clock.

    Args:
      keep: Whether to keep the actions; otherwise only computing time is summed.
      watch: Called with every action as well, or None.
    """

    def __init__(self, keep: bool, watch: Callable[[Timed], None] | None = None) -> None:
        self._keep, self._watch = keep, watch
        self._lock = threading.Lock()
        self._rows: list[Timed] = []
        self._busy: list[tuple[float, float]] = []

    def add(self, row: Timed) -> None:
        """Records an action; any thread may call it."""
        if self._watch is not None:
            self._watch(row)
        with self._lock:
            if self._keep:
                self._rows.append(row)
            if row.action.kind in COMPUTE:
                self._busy.append((row.start_s, row.end_s))

    def take(self) -> tuple[list[Timed], float]:
        """Returns the actions recorded since the last call and their computing seconds."""
        with self._lock:
            rows, busy = self._rows, self._busy
            self._rows, self._busy = [], []
        return rows, union_s(busy)
