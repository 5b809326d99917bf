"""The I/O thread's half of a link: its connections, arrivals, and end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from comms.emulation.shaping import LinkShape
from comms.errors import BusyError, ChannelError, DamageError, FrameError, PeerClosed, PeerLost
from comms.link.allowance import Allowance
from comms.link.arrivals import Arrivals
from comms.link.connection import Connection
from comms.link.heartbeat import Heartbeat
from comms.link.inbox import Inbox
from comms.link.message import Message
from comms.link.meter import ClockMeter
from comms.link.outbox import Outbox
from comms.link.owner import StreamOwner
from comms.link.send_queue import SendQueue
from comms.link.signals import Signals
from comms.link.status_reports import StatusReports
from comms.wire import bounded_json
from comms.wire.bounded_json import reason_text
from comms.wire.event_loop import READ, Guard, Timer, place_of, report
from comms.wire.frame import Header
from comms.wire.greeting import Terms
from comms.wire.transport import ConnectionEnded, Transport

if TYPE_CHECKING:
    import threading

    from comms.link.link import Link

#: Seconds in which what waits on a link that was closed may still leave.
LINGER_S = 1.0
_MAX_DAMAGES = 3  # consecutive connections without a complete frame


class Stream:
    """The stream of one link; only the I/O thread calls its methods.

    Other threads call ``comms.link.link.Link``. Both share ``queue``, and the link posts calls to
    ``guard``; the stream refers to its link only in the messages that it delivers.

    Args:
      owner: The endpoint.
      terms: Terms of the peer in the handshake.
      address: The peer's address, as text.
      dialled: Whether this side opened the connection, and so reopens it.
      session: Names the stream on both sides.

    Attributes:
      peer: Name of the peer in the handshake.
      address: The peer's address, as text.
      attempt: Number of connections of this stream so far.
      session: Names the stream on both sides.
      dialled: Whether this side opened the connection, and so reopens it.
      resume_s: Seconds for which the stream outlives a connection.
      options: The endpoint's settings.
      queue: Messages of callers, and the end of the link.
      clock: How the peer's clock differs from ours.
      guard: The I/O thread for calls of this link.
      connection: The current connection.
    """

    def __init__(
        self, owner: StreamOwner, terms: Terms, address: str, *, dialled: bool, session: str
    ) -> None:
        options = self.options = owner.options
        self.peer = terms.name
        self.address = address
        self.attempt = terms.attempt
        self.session = session
        self.dialled = dialled
        self.resume_s = min(options.resume_s, terms.resume_s)
        self.guard = self._loop = Guard(owner.loop, self.fail)
        self.queue = SendQueue(terms.window_bytes, self._post_flush)
        self.clock = ClockMeter()
        checked = options.wants_checksum or terms.checksum
        self.outbox = Outbox(
            self.queue,
            self._pack_status,
            keep=self.resume_s > 0,
            replay_bytes=options.replay_bytes,
            checked=checked,
        )
        self.arrivals = Arrivals(self.clock, self._release, options.limits.waiting_bytes)
        self.inbox = self.arrivals.inbox = Inbox(
            options.limits,
            Allowance.of(options.limits) if dialled else None,
            options.window_bytes,
            owner.pool,
            checked,
            on_tensor=self.arrivals.tensor,
            on_bundle=self.arrivals.bundle,
            on_control=self.arrivals.control,
            on_signal=self._on_signal,
        )
        self.connection = Connection(
            self.inbox,
            self.outbox,
            self.arrivals,
            self.clock,
            self._loop,
            on_read=self._after_read,
            on_written=self._after_write,
            on_error=self._connection_failed,
        )
        self._reports = StatusReports(
            self.inbox, self.outbox, self._loop, options,
            self.connection.flush_now, self.connection.post_flush,
        )  # fmt: skip
        self._heartbeat = Heartbeat(
            self.inbox,
            self.outbox,
            self.clock,
            self._loop,
            options,
            paused=lambda: self.arrivals.paused,
            flush=self.connection.run,
            on_silence=self.connection_ended,
        )
        self._signals = Signals(
            self.queue, self.outbox, self.connection, self._heartbeat,
            on_credit=self._credit_returned, on_goodbye=self._peer_closed,
        )  # fmt: skip
        self._owner = owner
        self._resume_timer: Timer | None = None
        self._on_credit: Callable[[], None] | None = None
        self._on_lost: Callable[[ChannelError], None] | None = None
        self._goodbye_sent = False
        self._drainers: list[threading.Event] = []
        self._damages = 0

    @property
    def transport(self) -> Transport | None:
        """The current connection, if any."""
        return self.connection.transport

    def _post_flush(self) -> None:
        self.connection.post_flush()

    # -- what the callers' half posts --------------------------------------------------------------

    def belong_to(self, link: Link) -> None:
        """Sets the link of received messages; called before the first can arrive."""
        self.arrivals.link = link

    def start(
        self,
        on_message: Callable[[Message], None],
        on_credit: Callable[[], None],
        on_lost: Callable[[ChannelError], None],
    ) -> None:
        """Begins delivery; see ``Link.start``."""
        lost_before = self.queue.error
        self._on_credit, self._on_lost = on_credit, on_lost
        self.arrivals.start(on_message)
        if lost_before is not None:
            if not self.queue.closing:
                on_lost(lost_before)
            return
        self.connection.watch()
        self.connection.read_soon()
        self.connection.run(READ)

    def drain(self, done: threading.Event) -> None:
        """Sets ``done`` when all messages have left, or the link has ended."""
        self._drainers.append(done)
        self._check_drained()

    def share_shape(self, other: Stream) -> None:
        """Shares the emulated line of another stream."""
        self.outbox.pace.share_shape(other.outbox.pace)
        self.connection.limit()
        self.connection.run()

    def reshape(self, shape: LinkShape) -> None:
        """Sets the emulated shape of this side's sending."""
        self.outbox.set_shape(shape, time.monotonic())
        self.connection.limit()
        self.connection.run()

    # -- connections ---------------------------------------------------------------

    def attach(self, transport: Transport, leftover: bytes, terms: Terms) -> None:
        """Adopts a connection after its handshake; resumes the stream on it."""
        self.detach()
        try:
            self.outbox.restart(terms.received, terms.partial_bytes, time.monotonic())
        except FrameError as error:
            transport.close()
            self._protocol_error(error)
            return
        if self._resume_timer is not None:
            self._resume_timer.cancel()
            self._resume_timer = None
        self._reports.connect()
        self.connection.open(transport)
        try:
            self.inbox.restart(leftover)
        except DamageError as error:
            self._damaged(error)
            return
        except ChannelError as error:
            self._protocol_error(error)
            return
        self._heartbeat.start()
        if transport.secure:
            self.connection.read_soon()

    def suspend(self) -> None:
        """Ends the current connection because the peer is about to resume on another one."""
        self.connection_ended("its new connection was never completed")

    def detach(self) -> None:
        """Closes the current connection, if any; its remaining data are never read."""
        self._heartbeat.stop()
        self._reports.disconnect()
        self.connection.close()

    def received(self) -> tuple[int, int]:
        """Returns the last sequence number received and the bytes of the frame after it."""
        return self.inbox.received, self.inbox.partial_bytes

    def _after_read(self) -> None:
        self._reports.note_arrivals()

    def _after_write(self) -> None:
        if self._drainers or self.queue.closing:
            self._check_drained()

    def _connection_failed(self, error: ConnectionEnded | ChannelError) -> None:
        if isinstance(error, ConnectionEnded):
            self.connection_ended(str(error))
        elif isinstance(error, DamageError):
            self._damaged(error)
        else:
            self._protocol_error(error)

    def _check_drained(self) -> None:
        if self.outbox.empty or self.queue.error is not None:
            for event in self._drainers:
                event.set()
            self._drainers.clear()
        if self.queue.closing and self.outbox.empty and not self._goodbye_sent:
            self._goodbye_sent = True
            if self.transport is not None:
                self.transport.shut()

    # -- what the parts call -----------------------------------------------------------------------

    def _release(self, cost: int) -> None:
        """Gives credit back; from any thread."""
        self._reports.release(cost)

    def _pack_status(self) -> bytes:
        return self._reports.pack()

    def _on_signal(self, header: Header, payload: bytes) -> None:
        self._signals.take(header, payload)

    def _credit_returned(self) -> None:
        if self._on_credit is not None:
            self._on_credit()

    # -- the end -------------------------------------------------------------------

    def _peer_closed(self, reason: str) -> None:
        self._lose(PeerClosed(f"{self.peer} at {self.address} closed the link: {reason}"))

    def _protocol_error(self, error: ChannelError) -> None:
        """Sends the peer the error, if possible without waiting, and ends the link."""
        if self.transport is not None:
            self.outbox.part_with(self.transport, _goodbye(f"protocol error: {error}"))
        lost = PeerLost(f"{self.peer} at {self.address} broke the protocol: {error}")
        lost.__cause__ = error
        self._lose(lost)

    def _damaged(self, error: DamageError) -> None:
        """Requests a damaged frame again, if the stream can resume."""
        self._damages = 1 if self.inbox.proven else self._damages + 1
        if self.resume_s > 0 and self._damages <= _MAX_DAMAGES:
            self.connection_ended(f"bytes were damaged in transit: {error}")
            return
        advice = "with resume_s above 0 it would be sent again"
        if self.resume_s > 0:
            advice = f"{self._damages} times in a row"
        error = DamageError(f"bytes were damaged in transit: {error} ({advice})")
        if self.transport is not None:
            self.outbox.part_with(self.transport, _goodbye(str(error)))
        self._lose(self._lost(error))

    def fail(self, error: Exception) -> None:
        """Ends only this link because of an unexpected exception; see ``Guard``."""
        if self.queue.error is not None:
            report(error)  # its owner has already been notified
            return
        if self.transport is not None:
            reason = f"that side failed on this link ({type(error).__name__})"
            self.outbox.part_with(self.transport, _goodbye(reason))
        lost = self._lost(f"this side failed on this link: {place_of(error)}")
        lost.__cause__ = error
        self._lose(lost)

    def connection_ended(self, how: str) -> None:
        """Continues without a connection if the stream can resume, else ends the link."""
        self.detach()
        if self.queue.error is not None:
            return
        if self.queue.closing:
            self._lose(self.closed_here())
            return
        if self.resume_s == 0:
            self._lose(self._lost(how))
            return
        if self._resume_timer is None:
            until_s = time.monotonic() + self.resume_s
            self._resume_timer = self._loop.at(until_s, lambda: self._give_up(how))
        if self.dialled:
            self._owner.redial(self)

    def _give_up(self, how: str) -> None:
        self.outbox.cut_off = not self.outbox.empty
        self._lose(self._lost(f"{how}, and it did not come back within {self.resume_s:g} s"))

    def refuse_resume(self, error: ChannelError) -> None:
        """Ends the link because the peer will not resume it."""
        self.outbox.cut_off = not self.outbox.empty
        self._lose(self._lost(error))

    def say_goodbye(self, reason: str, *, refuse: bool = False) -> None:
        """Ends the link and sends the peer the reason, for at most a second.

        Args:
          reason: Reason for the peer.
          refuse: Whether waiting and arriving messages are dropped instead of being sent and
            delivered.
        """
        if self.queue.error is not None or (self.queue.closing and not refuse):
            return
        self.queue.close()
        if refuse:
            self.arrivals.close()
            self.outbox.drop_waiting()
        if self.transport is None:
            self._lose(self.closed_here())
            return
        self.outbox.say_goodbye(_goodbye(reason))
        self._loop.at(time.monotonic() + LINGER_S, lambda: self._end_linger(reason))
        self.connection.run()

    def _end_linger(self, reason: str) -> None:
        """Ends a link that could not send all in time; the peer gets the reason if it can."""
        if self.transport is not None and self.outbox.owes_goodbye:
            self.outbox.part_with(self.transport, _goodbye(reason))
        self._lose(self.closed_here())

    def closed_here(self) -> PeerLost:
        """Returns the error of a link that this side has closed."""
        how = "refused" if self.arrivals.deaf else "closed"
        return PeerLost(f"the link to {self.peer} was {how} on this side")

    def _lost(self, how: object) -> PeerLost:
        return PeerLost(f"lost {self.peer} at {self.address}: {how}")

    def turn_away(self, error: BusyError) -> None:
        """Ends a link that is not admitted beyond the limit, and notifies its owner."""
        self.guard.run(self._turn_away, error)

    def _turn_away(self, error: BusyError) -> None:
        if self.inbox.allowance is not None:
            return  # another thread has just admitted it, and its leave is posted
        if self.transport is not None:
            self.outbox.part_with(self.transport, _goodbye(str(error)))
        self._lose(self._lost(error))

    def abandon(self, error: PeerLost) -> None:
        """Ends the link immediately; used when the endpoint closes or its thread has failed."""
        self._lose(error)

    def _lose(self, error: PeerLost) -> None:
        if self.queue.error is not None:
            return
        self.queue.end(error)
        self.detach()
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        self._owner.forget(self)
        self.outbox.abandon()
        for event in self._drainers:
            event.set()
        self._drainers.clear()
        self.queue.ended.set()
        if self._on_lost is not None and not self.queue.closing:
            self._on_lost(error)


def _goodbye(reason: str) -> bytes:
    return bounded_json.encode({"reason": reason_text(reason)}, "a goodbye")
