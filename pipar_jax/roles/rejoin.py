"""A host that lost its coordinator keeps trying to rejoin within its time limit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from pipar_jax.errors import PiparError
from pipar_jax.report.logs import LOG

#: The first pause between two tries and the longest, in seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0


def persist(
    take_part: Callable[[float], None],
    *,
    join_timeout_s: float,
    rejoin_s: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs a host's part of a run; joins again after a loss that may be temporary.

    Pauses grow and are drawn at random, so that many hosts do not return at once.

    Args:
      take_part: Joins within the given seconds and takes part to the end. Its errors report with
        ``again`` whether another try makes sense, and with ``taken`` whether it was admitted.
      join_timeout_s: Seconds for the first try.
      rejoin_s: Seconds after a loss for which to try again; 0: not at all.
      stop: Ends the pauses when set.
      clock: The monotonic clock.

    Raises:
      PiparError: The last try's error, when the time is up or another try is useless.
    """
    until_s: float | None = None
    pause_s = FIRST_PAUSE_S
    while True:
        timeout_s = join_timeout_s if until_s is None else max(until_s - clock(), 0.1)
        try:
            take_part(timeout_s)
            return
        except PiparError as error:
            if not (rejoin_s and error.again):
                raise
            if until_s is None or error.taken:
                until_s, pause_s = clock() + rejoin_s, FIRST_PAUSE_S
            if clock() + pause_s >= until_s or stop.is_set():
                raise
            LOG.warning("%s; trying to rejoin", error)
        stop.wait(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
