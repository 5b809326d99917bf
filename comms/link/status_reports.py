"""STATUS frames, which report arrivals, released credit and the measured rate to the peer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from comms.link.inbox import Inbox
from comms.link.outbox import Outbox
from comms.options import ChannelOptions
from comms.wire.event_loop import Guard, Timer
from comms.wire.frame import MAX_RATE, STATUS

_REPORT_S = 0.004
_REPORT_BYTES = 1 << 15


class StatusReports:
    """Decides when a report is due; methods run on the I/O thread unless stated otherwise.

    Args:
      inbox: The receiving half.
      outbox: The sending half.
      loop: The I/O thread.
      options: Settings, such as the peer's credit.
      flush: Writes pending frames; I/O thread only.
      post_flush: Makes the I/O thread do so; from any thread.
    """

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        loop: Guard,
        options: ChannelOptions,
        flush: Callable[[], None],
        post_flush: Callable[[], None],
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._loop = loop
        self._window_bytes = options.window_bytes
        # The peer's replay limit is its own setting; in most runs both sides have the same.
        self._most_bytes = max(_REPORT_BYTES, options.replay_bytes // 4)
        self._flush = flush
        self._post_flush = post_flush
        self._lock = threading.Lock()
        self._connected = False
        self._timer: Timer | None = None
        self._posted = False
        self._received = 0
        self._released_bytes = 0
        self._bytes_in = 0
        self._rate: float | None = None

    def connect(self) -> None:
        """Reports that a connection is available."""
        self._connected = True

    def disconnect(self) -> None:
        """Reports that no connection is available; the next one starts with a STATUS."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._connected = self._posted = False

    def pack(self) -> bytes:
        """Returns the payload of a STATUS, which is sent next."""
        inbox = self._inbox
        self._received, self._bytes_in = inbox.received, inbox.bytes_in
        self._released_bytes = inbox.released_bytes
        self._rate = inbox.rate.bytes_per_s
        rate = min(self._rate or 0.0, MAX_RATE)
        return STATUS.pack(self._received, self._released_bytes, rate)

    def release(self, cost: int) -> None:
        """Returns credit; from any thread."""
        with self._lock:
            self._inbox.released_bytes += cost
            untold = self._inbox.released_bytes - self._released_bytes
        if 4 * untold >= self._window_bytes:
            self._outbox.status_due = True
            self._post_flush()
        elif not self._posted:
            self._posted = True
            self._loop.post(self._after_release)

    def note_arrivals(self) -> None:
        """Schedules a report if necessary; called after reading, before a flush."""
        inbox = self._inbox
        if inbox.received == self._received:
            return
        rate, known = inbox.rate.bytes_per_s, self._rate
        if rate is not None and (known is None or not 0.7 < rate / known < 1.4):
            self._outbox.status_due = True
        elif rate is None or self._outbox.keep:
            # The peer waits for reports: before the first measurement it sends little at a time,
            # and its replay buffer is limited.
            enough = (rate or 0.0) * (_REPORT_S / 2)
            if inbox.bytes_in - self._bytes_in >= max(_REPORT_BYTES, min(enough, self._most_bytes)):
                self._outbox.status_due = True
            else:
                self._tell_soon()

    def _after_release(self) -> None:
        self._tell_soon()
        # While a report is scheduled, no other thread has to wake this one.
        self._posted = self._timer is not None

    def _tell_soon(self) -> None:
        """Sends a report in a few milliseconds, for many small messages together."""
        if self._timer is None and self._connected:
            self._timer = self._loop.at(time.monotonic() + _REPORT_S, self._tell_now)

    def _tell_now(self) -> None:
        self._timer = None
        self._posted = False  # before the count is read: a release from here on posts
        inbox = self._inbox
        if (inbox.received, inbox.released_bytes) != (self._received, self._released_bytes):
            self._outbox.status_due = True
            self._flush()
