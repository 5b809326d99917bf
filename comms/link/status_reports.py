"""When the peer hears what arrived, what was released and how fast it sends, in STATUS frames."""

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
    """What the peer does not know yet; methods run on the I/O thread unless they say otherwise.

    Args:
      inbox: What arrived.
      outbox: Where a STATUS is asked for.
      loop: The I/O thread.
      options: How much credit the peer has.
      flush: Writes what is to be sent; I/O thread only.
      post_flush: Has the I/O thread do so; from any thread.
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
        # What the peer may keep is its own setting; most runs give both sides the same.
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
        """Says that there is a connection to send on."""
        self._connected = True

    def disconnect(self) -> None:
        """Says that there is none; the next one begins with a STATUS anyway."""
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
        """Gives credit back; from any thread."""
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
        """Called after reading, before a flush: sees to it that the peer hears of it in time."""
        inbox = self._inbox
        if inbox.received == self._received:
            return
        rate, known = inbox.rate.bytes_per_s, self._rate
        if rate is not None and (known is None or not 0.7 < rate / known < 1.4):
            self._outbox.status_due = True
        elif rate is None or self._outbox.keep:
            # The peer waits for this: before the first measurement it sends little at a time, and
            # what may have to be sent again is bounded.
            enough = (rate or 0.0) * (_REPORT_S / 2)
            if inbox.bytes_in - self._bytes_in >= max(_REPORT_BYTES, min(enough, self._most_bytes)):
                self._outbox.status_due = True
            else:
                self._tell_soon()

    def _after_release(self) -> None:
        self._tell_soon()
        # While a report is due anyway, nobody else needs to wake this thread for one.
        self._posted = self._timer is not None

    def _tell_soon(self) -> None:
        """Sends a report in a few milliseconds, for many small messages at once."""
        if self._timer is None and self._connected:
            self._timer = self._loop.at(time.monotonic() + _REPORT_S, self._tell_now)

    def _tell_now(self) -> None:
        self._timer = None
        self._posted = False  # before the count is read: a release from here on posts
        inbox = self._inbox
        if (inbox.received, inbox.released_bytes) != (self._received, self._released_bytes):
            self._outbox.status_due = True
            self._flush()
