"""Emulated links: a rate, a one-way delay and a schedule of rates, without root.

The sender keeps a virtual clock. A frame of b bytes occupies the link from ``start`` to
``start + b / rate`` and may leave the process ``delay_s`` after that. While frames wait, the next
one starts when the last one ended, not when the thread woke up, so the coarse timers of the
operating system delay single frames by a millisecond but cost no throughput.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from comms.emulation.timetable import read_timetable
from comms.errors import ChannelError

PRESETS_MBPS: dict[str, tuple[float | None, float | None]] = {
    "4g": (10.0, 25.0),
    "4g+": (20.0, 40.0),
    "wifi": (50.0, 50.0),
    "lan": (1000.0, 1000.0),
    "none": (None, None),
}
"""Named links: rate up and down in Mbit/s; None is unlimited."""

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 12
CHUNK_TIME_S = 0.025
_MAX_CATCH_UP_S = 1.0


@dataclass(frozen=True)
class LinkShape:
    """The shape of one direction of a link.

    Attributes:
      rate_mbps: Rate in Mbit/s (10**6 bits); None is unlimited.
      delay_s: one-way delay in seconds, added to every frame.
      schedule: Pairs (seconds since the shape was set, rate in Mbit/s), in increasing order; each
        replaces the rate from its time on.
    """

    rate_mbps: float | None = None
    delay_s: float = 0.0
    schedule: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ChannelError: If a rate is not positive, a time is negative or out of order.
        """
        rates = [rate for _, rate in self.schedule]
        if self.rate_mbps is not None:
            rates.append(self.rate_mbps)
        if any(not (rate > 0 and math.isfinite(rate)) for rate in rates):
            raise ChannelError(f"link rates must be positive numbers of Mbit/s, got {rates}")
        if not (self.delay_s >= 0 and math.isfinite(self.delay_s)):
            raise ChannelError(f"a link's delay must be 0 s or more, got {self.delay_s}")
        times = [at for at, _ in self.schedule]
        if times != sorted(times) or any(at < 0 for at in times):
            raise ChannelError(f"a schedule's times must rise from 0 s, got {times}")

    @property
    def unlimited(self) -> bool:
        """Whether the link has neither rate nor delay."""
        return self.rate_mbps is None and self.delay_s == 0 and not self.schedule

    @property
    def opening(self) -> LinkShape:
        """This shape without its schedule, as before the start of a run."""
        return LinkShape(self.rate_at(0.0), self.delay_s)

    def after(self, elapsed_s: float) -> LinkShape:
        """Returns the rest of this shape after a number of seconds."""
        left = tuple((at - elapsed_s, rate) for at, rate in self.schedule if at > elapsed_s)
        return LinkShape(self.rate_at(elapsed_s), self.delay_s, left)

    def rate_at(self, elapsed_s: float) -> float | None:
        """Returns the rate in Mbit/s at a time since the shape was set."""
        rate = self.rate_mbps
        for at_s, scheduled in self.schedule:
            if elapsed_s < at_s:
                break
            rate = scheduled
        return rate


class Shaper:
    """The virtual clock of one direction of one link; used by the I/O thread only."""

    def __init__(self, shape: LinkShape, now_s: float) -> None:
        self.shape = shape
        self.next_free_s = now_s
        self._origin_s = now_s

    def admit(
        self, now_s: float, nbytes: int, waiting: bool, queued_s: float = 0.0
    ) -> tuple[float, float]:
        """Schedules a frame on the virtual link.

        Args:
          now_s: The monotonic clock.
          nbytes: Bytes of the frame, header included.
          waiting: Whether a frame was already waiting when the link became free.
          queued_s: When this frame's message was sent; it does not leave earlier.

        Returns:
          The times at which its first and its last byte leave the sender, without the delay.
        """
        start = max(self.next_free_s, min(queued_s, now_s))
        if not waiting or start < now_s - _MAX_CATCH_UP_S:
            start = max(start, now_s)
        end = self._end(start, nbytes)
        self.next_free_s = end
        return start, end

    def _end(self, start_s: float, nbytes: int) -> float:
        """Integrates the scheduled rate from ``start_s`` until ``nbytes`` have passed."""
        bits = nbytes * 8.0
        now = start_s
        for at_s, _ in self.shape.schedule:
            change = self._origin_s + at_s
            if change <= now:
                continue
            rate = self.shape.rate_at(now - self._origin_s)
            if rate is None:
                return now
            passed = (change - now) * rate * 1e6
            if passed >= bits:
                return now + bits / (rate * 1e6)
            bits -= passed
            now = change
        rate = self.shape.rate_at(now - self._origin_s)
        return now if rate is None else now + bits / (rate * 1e6)

    def rate_bytes(self, now_s: float) -> float | None:
        """Returns the current rate in bytes per second; None is unlimited."""
        rate = self.shape.rate_at(now_s - self._origin_s)
        return None if rate is None else rate * 1e6 / 8


def chunk_bytes(rate_bytes: float | None) -> int:
    """Returns the size of a chunk that occupies the link for at most 25 ms."""
    if rate_bytes is None:
        return MAX_CHUNK_BYTES
    return int(min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, rate_bytes * CHUNK_TIME_S)))


_TRACE = "trace:"
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_RATES = re.compile(rf"^{_NUMBER}/{_NUMBER}(?:/{_NUMBER}(ms|s))?$")
_NAMED = re.compile(rf"^([a-z0-9+]+)(?:/{_NUMBER}(ms|s))?$")


def parse_link(text: str) -> tuple[LinkShape, LinkShape]:
    """Parses a link such as ``4g+``, ``20/40``, ``20/40/30ms``, ``wifi/5ms`` or ``trace:FILE``.

    Args:
      text: A name of ``PRESETS_MBPS`` or "up/down" in Mbit/s, optionally followed by a round-trip
        delay, of which each direction gets half; or a CSV file of rates over time with the columns
        ``time_s,up_mbps,down_mbps``, each row valid until the next.

    Returns:
      The shapes up (device to server) and down.

    Raises:
      ChannelError: If the text is not valid, with the known names, or if the file cannot be used.
    """
    word = text.strip().lower()
    if word.startswith(_TRACE):
        return _read_trace(text.strip()[len(_TRACE) :])
    up: float | None
    down: float | None
    if match := _RATES.match(word):
        up, down = float(match[1]), float(match[2])
        delay, unit = match[3], match[4]
    elif (match := _NAMED.match(word)) and match[1] in PRESETS_MBPS:
        up, down = PRESETS_MBPS[match[1]]
        delay, unit = match[2], match[3]
    else:
        raise ChannelError(
            f"unknown link {text!r}: give one of {', '.join(PRESETS_MBPS)}, or rates up and down "
            "in Mbit/s such as 20/40, or with a round-trip delay such as 20/40/30ms, or rates "
            "over time as trace:FILE"
        )
    round_trip_s = float(delay) / (1000.0 if unit == "ms" else 1.0) if delay else 0.0
    return LinkShape(up, round_trip_s / 2), LinkShape(down, round_trip_s / 2)


def _read_trace(path: str) -> tuple[LinkShape, LinkShape]:
    """Returns the shapes up and down that a file of rates over time describes."""
    rows = read_timetable(path, ("up_mbps", "down_mbps"))
    for at_s, *rates in rows:
        if min(rates) <= 0:
            raise ChannelError(f"{path}: rates must be positive, got {rates} Mbit/s at {at_s:g} s")
    up, down = (
        LinkShape(rows[0][column], 0.0, tuple((row[0], row[column]) for row in rows[1:]))
        for column in (1, 2)
    )
    return up, down
