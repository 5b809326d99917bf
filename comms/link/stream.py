"""The I/O thread's half of a link: connections, heartbeats, what arrives, and the end."""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from comms.emulation.shaping import LinkShape
from comms.errors import BusyError, ChannelError, DamageError, FrameError, PeerClosed, PeerLost
from comms.link.allowance import Allowance
from comms.link.arrivals import Arrivals
from comms.link.inbox import Inbox
from comms.link.meter import ClockMeter
from comms.link.outbox import Outbox
from comms.link.status_reports import News
from comms.wire import bounded_json
from comms.wire.bounded_json import one_line, reason_text
from comms.wire.event_loop import READ, WRITE, Guard, Timer, place_of, report
from comms.wire.frame import MAX_CLOCK_S, MAX_RATE, PING, PONG, STATUS, Header, Kind
from comms.wire.greeting import Terms
from comms.wire.transport import ConnectionEnded, Transport

if TYPE_CHECKING:
    from comms.link.endpoint import Endpoint
    from comms.link.link import Link

_READ_BUDGET_BYTES = 4 << 20
_WRITE_BUDGET_BYTES = 4 << 20
_FIRST_PINGS = 6
_FIRST_PING_S = 0.02
_LINGER_S = 1.0
_MAX_DAMAGES = 3  # connections in a row that brought no frame whole


class Stream:
    """What the I/O thread does for one link: connections, heartbeats, arrivals, the end.

    `comms.link.link.Link` adds what other threads may call. Here, methods run on the I/O thread
    unless they say otherwise.

    Attributes:
        peer: the name that the peer gave in the handshake.
        address: the peer's address, as text.
        attempt: how many connections this stream has had.
        session: names the stream on both sides.
        dialled: whether this side opened the connection, and so reopens it.
        resume_s: how long the stream outlives a connection.
    """

    def __init__(
        self, endpoint: Endpoint, terms: Terms, address: str, *, dialled: bool, session: str
    ) -> None:
        options = endpoint.options
        self.peer = terms.name
        self.address = address
        self.attempt = terms.attempt
        self.session = session
        self.dialled = dialled
        self.resume_s = min(options.resume_s, terms.resume_s)
        self._endpoint = endpoint
        self.guard = Guard(endpoint.loop, self._failed_here)
        self._loop = self.guard
        self._options = options
        self._lock = threading.Lock()
        self._clock = ClockMeter()
        checked = options.wants_checksum or terms.checksum
        self._outbox = Outbox(
            self._pack_status, self.resume_s > 0, options.replay_bytes, checked=checked
        )
        self._outbox.peer_window_bytes = terms.window_bytes
        self._arrivals = Arrivals(
            cast("Link", self), self._clock, self._release, options.limits.waiting_bytes
        )
        self._inbox = self._arrivals.inbox = Inbox(
            options.limits,
            Allowance.of(options.limits) if dialled else None,
            options.window_bytes,
            endpoint.pool,
            checked,
            on_tensor=self._arrivals.tensor,
            on_bundle=self._arrivals.bundle,
            on_control=self._arrivals.control,
            on_signal=self._on_signal,
        )
        self._news = News(
            self._inbox, self._outbox, self._loop, options, self._flush_now, self._post_flush
        )
        self._transport: Transport | None = None
        self._interest = 0
        self._read_again = False
        self._soon = False
        self._reserved_bytes = 0
        self._submitted_raw_bytes = 0
        self._queued_peak_bytes = 0
        self._flush_posted = False
        self._timer: Timer | None = None
        self._beat: Timer | None = None
        self._resume_timer: Timer | None = None
        self._pings_sent = 0
        self._tick_s = time.monotonic()
        self._on_credit: Callable[[], None] | None = None
        self._on_lost: Callable[[ChannelError], None] | None = None
        self._error: PeerLost | None = None
        self._closing = False
        self._goodbye_sent = False
        self._drainers: list[threading.Event] = []
        self._closed = threading.Event()
        self._encode_s = 0.0
        self._reconnects = -1
        self._damages = 0

    def _post_flush(self) -> None:
        """From any thread: lets the I/O thread see what is to be sent."""
        if not self._flush_posted:
            self._flush_posted = True
            self._loop.post(self._flush_now)

    # -- connections ---------------------------------------------------------------

    def attach(self, transport: Transport, leftover: bytes, terms: Terms) -> None:
        """Takes a connection that has finished its handshake; resumes the stream on it."""
        self.detach()
        try:
            self._outbox.restart(terms.received, terms.partial_bytes, time.monotonic())
        except FrameError as error:
            transport.close()
            self._protocol_error(error)
            return
        if self._resume_timer is not None:
            self._resume_timer.cancel()
            self._resume_timer = None
        self._transport = transport
        self._news.connect()
        self._interest = 0
        self._reconnects += 1
        self._limit_transport()
        self._tick_s = time.monotonic()
        self._pings_sent = 0
        self._set_interest()
        try:
            self._inbox.restart(leftover)
        except DamageError as error:
            self._damaged(error)
            return
        except ChannelError as error:
            self._protocol_error(error)
            return
        self._heartbeat()
        if transport.secure:
            # What TLS has decrypted already is invisible to the selector.
            self._read_again = True
            self._run_soon()

    def suspend(self) -> None:
        """Ends the present connection because the peer is about to resume on another one."""
        self._connection_ended("its new connection was never completed")

    def detach(self) -> None:
        """Closes the present connection, if there is one; what it still holds is never read."""
        transport, self._transport = self._transport, None
        for timer in (self._timer, self._beat):
            if timer is not None:
                timer.cancel()
        self._timer = self._beat = None
        self._news.disconnect()
        if transport is not None:
            self._loop.forget(transport.socket)
            transport.close()
            self._outbox.drop_connection()
            self._inbox.settle()

    def received(self) -> tuple[int, int]:
        """Returns the last sequence number received and the bytes of the frame after it."""
        return self._inbox.received, self._inbox.partial_bytes

    def _run_ready(self, events: int) -> None:
        transport = self._transport
        if transport is None:
            return
        try:
            if (events & READ or self._read_again) and not self._paused:
                self._read_again = self._inbox.pump(transport, _READ_BUDGET_BYTES)
                if self._read_again:
                    self._run_soon()
                self._news.note_arrivals()
            if self._transport is transport:
                self._flush(transport)
        except ConnectionEnded as error:
            if self._transport is transport:
                self._connection_ended(str(error))
        except DamageError as error:
            self._damaged(error)
        except ChannelError as error:
            self._protocol_error(error)

    def _run_soon(self) -> None:
        """Goes on after the other links have had their turn; once, however often it is asked."""
        if not self._soon:
            self._soon = True
            self._loop.soon(self._run_again)

    def _run_again(self) -> None:
        self._soon = False
        self._run_ready(0)

    @property
    def _paused(self) -> bool:
        return self._arrivals.paused

    def _flush_now(self) -> None:
        self._flush_posted = False
        self._run_ready(0)

    def _flush(self, transport: Transport) -> None:
        again_s = self._outbox.flush(transport, _WRITE_BUDGET_BYTES)
        self._set_interest(writing=again_s is None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if again_s == 0:
            self._run_soon()
        elif again_s is not None and again_s != math.inf:
            self._timer = self._loop.at(again_s, lambda: self._run_ready(0))
        if self._drainers or self._closing:
            self._check_drained()

    def _check_drained(self) -> None:
        if self._outbox.empty or self._error is not None:
            for event in self._drainers:
                event.set()
            self._drainers.clear()
        if self._closing and self._outbox.empty and not self._goodbye_sent:
            self._goodbye_sent = True
            if self._transport is not None:
                self._transport.shut()

    def _set_interest(self, writing: bool = False) -> None:
        transport = self._transport
        if transport is None:
            return
        interest = (0 if self._paused else READ) | (WRITE if writing else 0)
        if interest == self._interest:
            return
        self._interest = interest
        if interest:
            self._loop.watch(transport.socket, interest, self._run_ready)
        else:
            self._loop.forget(transport.socket)

    def _limit_transport(self) -> None:
        transport = self._transport
        if transport is not None:
            transport.limit_unsent(self._outbox.unsent_limit_bytes)
            transport.limit_in_flight(self._outbox.in_flight_limit_bytes(self._clock.rtt_s))

    def join_shape(self, other: Stream) -> None:
        """Sends over the same emulated line as another stream; I/O thread only."""
        self._outbox.share_shape(other._outbox)
        self._limit_transport()
        self._run_ready(0)

    def reshape(self, shape: LinkShape) -> None:
        """Shapes what this side sends from now on; I/O thread only."""
        self._outbox.set_shape(shape, time.monotonic())
        self._limit_transport()
        self._run_ready(0)

    # -- heartbeats ----------------------------------------------------------------

    def _heartbeat(self) -> None:
        """Sends a ping and the news, and ends a connection that shows no life."""
        transport = self._transport
        if transport is None:
            return
        now = time.monotonic()
        self._pings_sent += 1
        first = self._pings_sent <= _FIRST_PINGS
        pause_s = (
            min(_FIRST_PING_S, self._options.heartbeat_s) if first else (self._options.heartbeat_s)
        )
        stalled_s = self._outbox.stalled_since_s
        silent_s = 0.0 if self._paused else now - self._inbox.last_read_s
        stalled_s = 0.0 if stalled_s is None else now - stalled_s
        # If this very thread did not run (a suspended process), silence proves nothing yet.
        slept, self._tick_s = now - self._tick_s > 2 * self._options.heartbeat_s + 0.5, now
        limit_s = self._options.silence_s
        if max(silent_s, stalled_s) > limit_s and not slept:
            what = (
                f"has sent nothing for {silent_s:.1f} s"
                if silent_s > stalled_s
                else f"has taken no bytes for {stalled_s:.1f} s"
            )
            self._connection_ended(f"{what}, the deadline is {self._options.deadline_s:g} s")
            return
        if not self._closing:
            self._outbox.ping_due = self._outbox.status_due = True
        self._beat = self._loop.at(now + pause_s, self._heartbeat)
        self._run_ready(0)

    def _release(self, cost: int) -> None:
        """Gives credit back; from any thread."""
        self._news.release(cost)

    def _pack_status(self) -> bytes:
        return self._news.pack()

    def _on_signal(self, header: Header, payload: bytes) -> None:
        if header.kind == Kind.PING and len(payload) == PING.size:
            self._outbox.pongs.append((_clocks(PING, payload)[0], self._inbox.last_read_s))
        elif header.kind == Kind.PONG and len(payload) == PONG.size:
            asked_s, arrived_s, left_s = _clocks(PONG, payload)
            self._clock.add(asked_s, arrived_s, left_s, self._inbox.last_read_s)
        elif header.kind == Kind.STATUS and len(payload) == STATUS.size:
            self._on_status(*STATUS.unpack(payload))
        elif header.kind == Kind.GOODBYE:
            self._on_goodbye(payload)
        else:
            raise FrameError(f"a {Kind(header.kind).name} frame of {len(payload)} bytes")

    def _on_status(self, received: int, released_bytes: int, rate: float) -> None:
        outbox = self._outbox
        if received > outbox.sequence or released_bytes > outbox.committed_bytes:
            raise FrameError(
                f"the peer acknowledges frame {received} of {outbox.sequence} and gives back "
                f"{released_bytes} of {outbox.committed_bytes} bytes"
            )
        if not 0 <= rate <= MAX_RATE:
            raise FrameError(f"the peer reports a rate of {rate} bytes per second")
        outbox.acknowledge(received)
        if rate:
            outbox.set_rate(rate, time.monotonic())
            self._limit_transport()
        if released_bytes > outbox.peer_released_bytes:
            with self._lock:
                outbox.peer_released_bytes = released_bytes
            if self._on_credit is not None:
                self._on_credit()

    # -- the end -------------------------------------------------------------------

    def _on_goodbye(self, payload: bytes) -> None:
        reason = bounded_json.decode(payload, "a GOODBYE frame").get("reason")
        if not isinstance(reason, str):
            raise FrameError("a GOODBYE frame without a reason")
        reason = one_line(reason)
        self._lose(PeerClosed(f"{self.peer} at {self.address} closed the link: {reason}"))

    def _protocol_error(self, error: ChannelError) -> None:
        """Tells the peer what it did wrong, if that can be done at once, and ends the link."""
        if self._transport is not None:
            self._outbox.part_with(self._transport, _goodbye(f"protocol error: {error}"))
        lost = PeerLost(f"{self.peer} at {self.address} broke the protocol: {error}")
        lost.__cause__ = error
        self._lose(lost)

    def _damaged(self, error: DamageError) -> None:
        """Has a frame that was changed on its way sent again, if the stream can resume."""
        self._damages = 1 if self._inbox.proven else self._damages + 1
        if self.resume_s > 0 and self._damages <= _MAX_DAMAGES:
            self._connection_ended(f"bytes were changed on their way: {error}")
            return
        advice = (
            f"{self._damages} times in a row"
            if self.resume_s > 0
            else "resume_s above 0 would have it sent again"
        )
        error = DamageError(f"bytes were changed on their way: {error} ({advice})")
        if self._transport is not None:
            self._outbox.part_with(self._transport, _goodbye(str(error)))
        self._lose(PeerLost(f"lost {self.peer} at {self.address}: {error}"))

    def _failed_here(self, error: Exception) -> None:
        """Ends this link alone over an exception that nothing expected; see `Guard`."""
        if self._error is not None:
            report(error)  # its owner has been told already
            return
        if self._transport is not None:
            reason = f"that side failed over this link ({type(error).__name__})"
            self._outbox.part_with(self._transport, _goodbye(reason))
        lost = PeerLost(
            f"lost {self.peer} at {self.address}: this side failed over it: {place_of(error)}"
        )
        lost.__cause__ = error
        self._lose(lost)

    def _connection_ended(self, how: str) -> None:
        """Goes on without a connection if the stream may resume, else ends the link."""
        self.detach()
        if self._error is not None:
            return
        if self._closing:
            self._lose(self._closed_here())
            return
        if self.resume_s == 0:
            self._lose(PeerLost(f"lost {self.peer} at {self.address}: {how}"))
            return
        if self._resume_timer is None:
            until_s = time.monotonic() + self.resume_s
            self._resume_timer = self._loop.at(until_s, lambda: self._give_up(how))
        if self.dialled:
            self._endpoint.redial(cast("Link", self))

    def _give_up(self, how: str) -> None:
        self._lose(
            PeerLost(
                f"lost {self.peer} at {self.address}: {how}, and it did not come back within "
                f"{self.resume_s:g} s"
            )
        )

    def refuse_resume(self, error: ChannelError) -> None:
        """Ends the link because the peer will not resume it."""
        self._lose(PeerLost(f"lost {self.peer} at {self.address}: {error}"))

    def say_goodbye(self, reason: str, *, refuse: bool = False) -> None:
        """Ends the link: the peer hears why, for a second at most.

        Args:
            reason: what the peer is told.
            refuse: whether what waits is dropped and what still arrives is too, instead of being
                sent and delivered.
        """
        if self._error is not None or (self._closing and not refuse):
            return
        with self._lock:
            self._closing = True
        if refuse:
            self._arrivals.close()
            self._outbox.drop_waiting()
        if self._transport is None:
            self._lose(self._closed_here())
            return
        self._outbox.say_goodbye(_goodbye(reason))
        closed = self._closed_here()
        self._loop.at(time.monotonic() + _LINGER_S, lambda: self._lose(closed))
        self._run_ready(0)

    def _closed_here(self) -> PeerLost:
        how = "refused" if self._arrivals.deaf else "closed"
        return PeerLost(f"the link to {self.peer} was {how} on this side")

    def turn_away(self, error: BusyError) -> None:
        """Ends a link that nobody has admitted, for want of room; its owner hears it."""
        self.guard.run(self._turn_away, error)

    def _turn_away(self, error: BusyError) -> None:
        if self._transport is not None:
            self._outbox.part_with(self._transport, _goodbye(str(error)))
        self._lose(PeerLost(f"lost {self.peer} at {self.address}: {error}"))

    def abandon(self, error: PeerLost) -> None:
        """Ends the link at once; used when the endpoint closes or its thread has failed."""
        self._lose(error)

    def _lose(self, error: PeerLost) -> None:
        if self._error is not None:
            return
        with self._lock:
            self._error = error
        self.detach()
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        self._endpoint.forget(cast("Link", self))
        self._outbox.abandon()
        for event in self._drainers:
            event.set()
        self._drainers.clear()
        self._closed.set()
        if self._on_lost is not None and not self._closing:
            self._on_lost(error)


def _goodbye(reason: str) -> bytes:
    return bounded_json.encode({"reason": reason_text(reason)}, "a goodbye")


def _clocks(form: struct.Struct, payload: bytes) -> tuple[float, ...]:
    """Returns the times of a PING or PONG.

    Raises:
        FrameError: if one is none.
    """
    times: tuple[float, ...] = form.unpack(payload)
    if not all(abs(time_s) <= MAX_CLOCK_S for time_s in times):
        raise FrameError(f"a heartbeat with the times {times}")
    return times
