"""Figures of a link: counters, clock offset, round trip and bandwidth from the transfers."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """A snapshot of a link's figures; "out" is what this side sent.

    Attributes:
      bytes_out: Bytes written to connections, headers and heartbeats included.
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
      queued_peak_bytes: The most that has ever been queued.
      unacked_bytes: Bytes kept for sending again after a cut.
      credit_used_bytes: Activation and cotangent bytes the peer has not released yet.
      held_bytes: Activation and cotangent bytes received here and not released yet.
      blocked_s: Time that bytes were ready while the socket took none.
      credit_wait_s: Time that a tensor at the head of the queue waited for credit.
      queue_s: Time from ``send`` to the first byte's leaving, summed over the messages (bundles as
        one) that were sent in full; by its share of a time, how many waited on average.
      encode_s: Time spent encoding on the worker.
      reconnects: Connections that replaced a cut one.
      repeated_frames: Frames put on a new connection since the peer had not confirmed them.
      repeated_bytes: Their bytes, without what the peer had of them already.
      rtt_s: Smallest recent round trip of a heartbeat; None before the first.
      offset_s: The peer's monotonic clock minus ours; None before the first heartbeat.
      rate_out_mbps: What the peer measured of our sending; None until enough was sent.
      rate_in_mbps: What we measured of the peer's sending; None until enough was received.
      timed_in_bytes: Bytes received back to back for long enough that a rate can be told.
      timed_in_s: How long they took on the link; between two snapshots, bytes by seconds is the
        rate of just that time.
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
    Queues only ever lengthen a round trip, so the sample with the shortest one is believed.
    """

    _SAMPLES = 32

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=self._SAMPLES)
        self._best: tuple[float, float] | None = None

    def add(self, t0: float, t1: float, t2: float, t3: float) -> None:
        """Takes the four times of one heartbeat, in seconds."""
        round_trip = (t3 - t0) - (t2 - t1)
        offset = ((t1 - t0) + (t2 - t3)) / 2
        if not (math.isfinite(round_trip) and math.isfinite(offset)) or round_trip < 0:
            return
        self._samples.append((round_trip, offset))
        self._best = min(self._samples)

    @property
    def samples(self) -> int:
        """How many heartbeats are remembered."""
        return len(self._samples)

    @property
    def rtt_s(self) -> float | None:
        """Shortest recent round trip."""
        return None if self._best is None else self._best[0]

    @property
    def offset_s(self) -> float | None:
        """The peer's clock minus ours, from that same heartbeat."""
        return None if self._best is None else self._best[1]


class RateMeter:
    """Bandwidth of one direction from the frames themselves.

    Only frames that were waiting when their predecessor left count (the sender marks them): the
    time between the ends of two such frames is what the second took on the link. Sums of bytes and
    seconds with exponential forgetting smooth over timers and bursts.

    Where a processor is busy, threads wake up milliseconds late. A run of frames without a gap has
    that error once, at its ends; so what compares a rate with another takes long runs alone.

    Attributes:
      timed_bytes: Bytes of all long runs so far.
      timed_s: Their seconds.
    """

    _MEMORY_S = 3.0
    _ENOUGH_BYTES = 48 << 10
    # A smaller frame's time is that of this program, not of the link.
    _SMALLEST_BYTES = 1 << 12
    # A run is long from here on.
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
        """Takes the end of a frame of ``nbytes``."""
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
        """Adds a frame to its run, and the run to what was timed once it is long."""
        self._run_bytes += nbytes
        self._run_s += seconds
        if self._counted or self._run_bytes >= self._LONG_BYTES or self._run_s >= self._LONG_S:
            self.timed_bytes += self._run_bytes
            self.timed_s += self._run_s
            self._run_bytes, self._run_s, self._counted = 0, 0.0, True

    def restart(self) -> None:
        """Forgets the last frame's end: a new connection begins."""
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
