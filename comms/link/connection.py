"""The current connection of a link: when it is read and written, and how much at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

from comms.errors import ChannelError
from comms.link.arrivals import Arrivals
from comms.link.inbox import Inbox
from comms.link.meter import ClockMeter
from comms.link.outbox import Outbox
from comms.wire.event_loop import READ, WRITE, Guard, Timer
from comms.wire.transport import ConnectionEnded, Transport

_READ_BUDGET_BYTES = 4 << 20
_WRITE_BUDGET_BYTES = 4 << 20
_LAST_READS = 16  # of as many bytes: more than a kernel holds


class Connection:
    """Used by the I/O thread, except ``post_flush``.

    Args:
      inbox: Reads.
      outbox: Writes.
      arrivals: May pause reading.
      clock: Round-trip time, which bounds the data in flight.
      loop: The I/O thread.
      on_read: Called after reading, before writing.
      on_written: Called after writing.
      on_error: Receives the end of the connection, or what the peer did wrong on it.

    Attributes:
      transport: The connection; None between two of them.
      opened: How many connections there have been.
    """

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        arrivals: Arrivals,
        clock: ClockMeter,
        loop: Guard,
        *,
        on_read: Callable[[], None],
        on_written: Callable[[], None],
        on_error: Callable[[ConnectionEnded | ChannelError], None],
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._arrivals = arrivals
        self._clock = clock
        self._loop = loop
        self._on_read = on_read
        self._on_written = on_written
        self._on_error = on_error
        self.transport: Transport | None = None
        self.opened = 0
        self._interest = 0
        self._read_again = False
        self._soon = False
        self._flush_posted = False
        self._timer: Timer | None = None

    def post_flush(self) -> None:
        """Wakes the I/O thread for new messages; from any thread."""
        if not self._flush_posted:
            self._flush_posted = True
            self._loop.post(self.flush_now)

    def open(self, transport: Transport) -> None:
        """Adopts a connection after its handshake."""
        self.transport = transport
        self.opened += 1
        self._interest = 0
        self.limit()
        self.watch()

    def close(self) -> None:
        """Closes the connection, if any; its remaining data are never read."""
        transport, self.transport = self.transport, None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if transport is not None:
            self._loop.forget(transport.socket)
            transport.close()
            self._outbox.drop_connection()
            self._inbox.settle()

    def read_soon(self) -> None:
        """Reads without a report of the selector, which does not see what TLS has decrypted."""
        self._read_again = True
        self._run_soon()

    def run(self, events: int = 0) -> None:
        """Reads and writes until the connection would block."""
        transport = self.transport
        if transport is None:
            return
        try:
            if (events & READ or self._read_again) and not self._arrivals.paused:
                self._read_again = self._inbox.pump(transport, _READ_BUDGET_BYTES)
                if self._read_again:
                    self._run_soon()
                self._on_read()
            if self.transport is transport:
                try:
                    self._flush(transport)
                except ConnectionEnded:
                    self._read_rest(transport)
                    raise
        except ConnectionEnded as error:
            if self.transport is transport:
                self._on_error(error)
        except ChannelError as error:
            self._on_error(error)

    def _read_rest(self, transport: Transport) -> None:
        """Reads what has arrived on a connection that takes no more: the peer's reason, perhaps."""
        with contextlib.suppress(ConnectionEnded):  # what ended it is known
            for _ in range(_LAST_READS):
                if self.transport is not transport or self._arrivals.paused:
                    return
                if not self._inbox.pump(transport, _READ_BUDGET_BYTES):
                    return

    def _run_soon(self) -> None:
        """Continues after other links have had their turn; several requests count once."""
        if not self._soon:
            self._soon = True
            self._loop.soon(self._run_again)

    def _run_again(self) -> None:
        self._soon = False
        self.run()

    def flush_now(self) -> None:
        """Writes what may leave."""
        self._flush_posted = False
        self.run()

    def _flush(self, transport: Transport) -> None:
        again_s = self._outbox.flush(transport, _WRITE_BUDGET_BYTES)
        self.watch(writing=again_s is None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if again_s == 0:
            self._run_soon()
        elif again_s is not None and again_s != math.inf:
            self._timer = self._loop.at(again_s, self.run)
        self._on_written()

    def watch(self, writing: bool = False) -> None:
        """Sets what the selector reports of the connection."""
        transport = self.transport
        if transport is None:
            return
        interest = (0 if self._arrivals.paused else READ) | (WRITE if writing else 0)
        if interest == self._interest:
            return
        self._interest = interest
        if interest:
            self._loop.watch(transport.socket, interest, self.run)
        else:
            self._loop.forget(transport.socket)

    def limit(self) -> None:
        """Bounds what the kernel holds unsent and in flight, by the current rate."""
        transport = self.transport
        if transport is not None:
            pace = self._outbox.pace
            transport.limit_unsent(pace.unsent_limit_bytes)
            transport.limit_in_flight(pace.in_flight_limit_bytes(self._clock.rtt_s))
