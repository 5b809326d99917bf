"""Statistics of a link: counters, clock offset, round trip and bandwidth."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """A snapshot of a link's statistics; "out" refers to this side's sending.

    Attributes:
      bytes_out: Bytes written to connections, including headers and heartbeats.
      bytes_in: Bytes read from connections.
      payload_out_bytes: Payload of messages sent in full, after the codec.
      payload_in_bytes: Payload of messages received in full, before decoding.
      raw_out_bytes: The same messages' size before the codec.
      raw_in_bytes: The same messages' size after decoding.
      messages_out: Messages sent in full.
      messages_in: Messages delivered.
      frames_out: Frames written.
      frames_in: Frames read.
      queued_messages: Messages that wait to be sent.
      queued_bytes: Their bytes before the codec.
      queued_peak_bytes: Maximum of ``queued_bytes`` since ``Link.begin_peak``, or so far.
      unacked_bytes: Bytes kept for replay after an interruption.
      credit_used_bytes: Activation and cotangent bytes the peer has not released yet.
      held_bytes: Activation and cotangent bytes received here and not released yet.
      blocked_s: Time during which bytes were ready and the socket accepted none.
      credit_wait_s: Time during which a tensor at the head of the queue waited for credit.
      queue_s: Time from ``send`` until the first byte left, summed over completely sent messages
        (bundles as one); divided by a time span, the mean number of waiting messages.
      encode_s: Time spent encoding on the worker.
      reconnects: Connections that replaced an interrupted one.
      repeated_frames: Frames sent again because the peer had not confirmed them.
      repeated_bytes: Their bytes, without parts that the peer already had.
      rtt_s: Smallest recent round trip of a heartbeat; None before the first.
      offset_s: The peer's monotonic clock minus ours; None before the first heartbeat.
      rate_out_mbps: Rate of our sending measured by the peer; None until enough was sent.
      rate_in_mbps: Measured rate of the peer's sending; None until enough was received.
      timed_in_bytes: Bytes received in long runs of consecutive frames.
      timed_in_s: Their duration; the quotient of differences between two snapshots is the rate in
        that time.
    """

    bytes_out: int
    bytes_in: int
    payload_out_bytes: int
    payload_in_bytes: int
    raw_out_bytes: int
    raw_in_bytes: int
    messages_out: int
    messages_in: int
    frames_out: int
    frames_in: int
    queued_messages: int
    queued_bytes: int
    queued_peak_bytes: int
    unacked_bytes: int
    credit_used_bytes: int
    held_bytes: int
    blocked_s: float
    credit_wait_s: float
    queue_s: float
    encode_s: float
    reconnects: int
    repeated_frames: int
    repeated_bytes: int
    rtt_s: float | None
    offset_s: float | None
    rate_out_mbps: float | None
    rate_in_mbps: float | None
    timed_in_bytes: int
    timed_in_s: float


class ClockMeter:
    """Round-trip time and clock offset from heartbeats, as NTP does it.

    With a ping sent at t0, received at t1, answered at t2 and the answer received at t3, the round
    trip is (t3 - t0) - (t2 - t1) and the offset of the peer's clock ((t1 - t0) + (t2 - t3)) / 2.
    Queues only lengthen round trips, so that the sample with the shortest is used.
    """

    _SAMPLES = 32

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=self._SAMPLES)
        self._best: tuple[float, float] | None = None

    def add(self, t0: float, t1: float, t2: float, t3: float) -> None:
        """Adds the four times of one heartbeat, in seconds."""
        round_trip = (t3 - t0) - (t2 - t1)
        offset = ((t1 - t0) + (t2 - t3)) / 2
        if not (math.isfinite(round_trip) and math.isfinite(offset)) or round_trip < 0:
            return
        self._samples.append((round_trip, offset))
        self._best = min(self._samples)

    @property
    def samples(self) -> int:
        """Number of heartbeats kept."""
        return len(self._samples)

    @property
    def rtt_s(self) -> float | None:
        """Shortest recent round trip."""
        return None if self._best is None else self._best[0]

    @property
    def offset_s(self) -> float | None:
        """The peer's clock minus ours, from the same heartbeat."""
        return None if self._best is None else self._best[1]


class RateMeter:
    """Bandwidth of one direction, measured from frames.

    Only frames that were waiting when their predecessor left are used (the sender marks them): the
    time between the ends of two such frames is the duration of the second. Sums of bytes and
    seconds with exponential decay smooth over timers and bursts. On a busy processor threads wake
    up milliseconds late. A run of consecutive frames has that error only at its ends; comparisons
    of rates therefore use only long runs.

    Attributes:
      timed_bytes: Bytes of all long runs so far.
      timed_s: Their seconds.
    """

    _MEMORY_S = 3.0
    _ENOUGH_BYTES = 48 << 10
    # The time of a smaller frame is dominated by this program, not by the link.
    _SMALLEST_BYTES = 1 << 12
    # Minimum duration of a long run.
    _LONG_BYTES, _LONG_S = 1 << 20, 0.05

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._seen_bytes = 0
        self._run_bytes = 0
        self._run_s = 0.0
        self._counted = False
        self.timed_bytes = 0
        self.timed_s = 0.0
        self._last_s: float | None = None

    def add(self, nbytes: int, back_to_back: bool, now_s: float) -> None:
        """Adds the end of a frame of ``nbytes``."""
        last, self._last_s = self._last_s, now_s
        if last is None or not back_to_back:
            self._run_bytes, self._run_s, self._counted = 0, 0.0, False
            return
        seconds = now_s - last
        self._count(nbytes, seconds)
        if nbytes < self._SMALLEST_BYTES:
            return
        keep = math.exp(-seconds / self._MEMORY_S)
        self._bytes = self._bytes * keep + nbytes
        self._seconds = self._seconds * keep + seconds
        self._seen_bytes += nbytes

    def _count(self, nbytes: int, seconds: float) -> None:
        """Adds a frame to its run, and a long run to the totals."""
        self._run_bytes += nbytes
        self._run_s += seconds
        if self._counted or self._run_bytes >= self._LONG_BYTES or self._run_s >= self._LONG_S:
            self.timed_bytes += self._run_bytes
            self.timed_s += self._run_s
            self._run_bytes, self._run_s, self._counted = 0, 0.0, True

    def restart(self) -> None:
        """Resets the end of the last frame for a new connection."""
        self._last_s = None

    @property
    def bytes_per_s(self) -> float | None:
        """The estimate, or None until 48 KiB were seen."""
        if self._seen_bytes < self._ENOUGH_BYTES or self._seconds <= 0:
            return None
        return self._bytes / self._seconds


def to_mbps(bytes_per_s: float | None) -> float | None:
    """Converts bytes per second to Mbit/s."""
    return None if bytes_per_s is None else bytes_per_s * 8 / 1e6
