"""How long a function takes, over several runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def least_s(function: Callable[[], object], repeats: int) -> float:
    """Returns the minimum of the seconds of several runs."""
    return min(_seconds(function) for _ in range(repeats))


def median_s(function: Callable[[], object], repeats: int, rest_s: float = 0.0) -> float:
    """Returns the median of the seconds of several runs, with a rest before each."""
    return statistics.median(_seconds(function, rest_s) for _ in range(repeats))


def _seconds(function: Callable[[], object], rest_s: float = 0.0) -> float:
    if rest_s:
        time.sleep(rest_s)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
