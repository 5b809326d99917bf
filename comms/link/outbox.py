"""The sending half of a link: messages to frames, priorities, credit, shaping and replay."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable

from comms.emulation.shaping import LinkShape, Shaper, chunk_bytes
from comms.errors import FrameError
from comms.link.outgoing import Frame, Outgoing, note_start, signal_frame
from comms.wire.frame import PING, PONG, Flag, Header, Kind, checksum_of, pack_header
from comms.wire.transport import MAX_BUFFERS, ConnectionEnded, Transport

# Plain numbers: the operators of IntFlag cost microseconds, and these are used for every frame.
_CONTROL_LANE = int(Flag.CONTROL_LANE)
_BACK_TO_BACK = int(Flag.BACK_TO_BACK)
_CHECKED = int(Flag.CHECKED)
_COALESCE_BYTES = 1 << 16
_SLOW_BYTES_PER_S = 3e6
_FIRST_CHUNK_BYTES = 1 << 14
# Until the first measurement comes back, at most this much is under way, in small chunks: what TCP
# lets through while it looks for the rate of a slow link would only be dropped in its queues.
_FIRST_FLIGHT_BYTES = 1 << 16
_FIRST_UNSENT_BYTES = 1 << 14
_IDLE = float("inf")


class Outbox:
    """Decides what leaves next and writes it; used by the I/O thread, but for the counters.

    The order: heartbeats and status, frames to repeat after a cut, control messages, then tensors
    and bundles in the order they were sent. A tensor that has no credit waits, and what is behind
    it waits too, so that tensors never overtake each other.

    Args:
        status: returns the payload of a STATUS frame.
        keep: whether frames are kept for replay until acknowledged.
        replay_bytes: bound of what is kept.
        checked: whether payloads are sent with their checksum.
    """

    def __init__(
        self, status: Callable[[], bytes], keep: bool, replay_bytes: int, *, checked: bool = False
    ) -> None:
        self.control: deque[Outgoing] = deque()
        self.data: deque[Outgoing] = deque()
        self.keep = keep
        self.peer_window_bytes = 0
        self.peer_released_bytes = 0
        self.committed_bytes = 0
        self.sequence = 0
        self.bytes_out = 0
        self.frames_out = 0
        self.messages_out = 0
        self.payload_out_bytes = 0
        self.raw_out_bytes = 0
        self.blocked_s = 0.0
        self.credit_wait_s = 0.0
        self.queue_s = 0.0
        self.repeated_frames = 0
        self.repeated_bytes = 0
        self.departed_raw_bytes = 0
        self.unacked_bytes = 0
        self.last_progress_s = time.monotonic()
        self.status_due = False
        self.ping_due = False
        self.pongs: deque[tuple[float, float]] = deque(maxlen=8)
        self._status = status
        self._checked = checked
        self._replay_bytes = replay_bytes
        self._unacked: deque[Frame] = deque()
        self._replay: deque[Frame] = deque()
        self._goodbye: bytes | None = None
        self._shaper: Shaper | None = None
        self.shapes_due = 0  # changes of shape that were asked for and not made yet
        self._waiting = False
        self._pipe: deque[tuple[float, Frame]] = deque()
        self._wire: deque[memoryview] = deque()
        self._frames: deque[Frame] = deque()
        self._wire_bytes = 0
        self._rate_bytes: float | None = None
        self._chunk_bytes = _FIRST_CHUNK_BYTES
        self._first_flight_bytes = 0
        self._blocked_since_s: float | None = None
        self._no_credit_since_s: float | None = None
        self._unheard_since_s: float | None = None

    # -- settings ------------------------------------------------------------------------------

    def share_shape(self, other: Outbox) -> None:
        """Takes turns with another link on its emulated line, as links of one radio do."""
        self._shaper = other._shaper

    def set_shape(self, shape: LinkShape, now_s: float) -> None:
        """Shapes what is sent from now on."""
        self._shaper = None if shape.unlimited else Shaper(shape, now_s)
        self._waiting = False
        self._resize_chunks(now_s)

    def set_rate(self, bytes_per_s: float | None, now_s: float) -> None:
        """Takes the peer's measurement of our sending, from which the chunks' size follows."""
        self._rate_bytes = bytes_per_s
        self._resize_chunks(now_s)

    @property
    def rate_bytes(self) -> float | None:
        """What the peer measured of our sending, in bytes per second."""
        return self._rate_bytes

    def _resize_chunks(self, now_s: float) -> None:
        if self._shaper is not None:
            self._chunk_bytes = chunk_bytes(self._shaper.rate_bytes(now_s))
        elif self._rate_bytes is not None:
            # A link that shares the machine with a thousand others looks slow and is not: below
            # this size the work per frame would make it so.
            self._chunk_bytes = max(_FIRST_CHUNK_BYTES, chunk_bytes(self._rate_bytes))

    @property
    def unsent_limit_bytes(self) -> int:
        """How much may lie unsent in the kernel: what the link takes in about 12 ms.

        Nothing overtakes what lies there. On a fast link it is some megabytes, so that the kernel
        does not run dry before this thread comes round again.
        """
        rate = self._rate_bytes
        return (
            _FIRST_UNSENT_BYTES
            if rate is None
            else int(max(_FIRST_UNSENT_BYTES, min(rate / 80, 1 << 22)))
        )

    def in_flight_limit_bytes(self, rtt_s: float | None) -> int | None:
        """How much a slow link should hold on its way; None on a fast one.

        TCP fills the queues before a slow link until they overflow, and a heartbeat then waits for
        what was dropped to be sent again. Twice the bandwidth-delay product leaves the estimate
        room to grow, 50 ms more keep the link busy.
        """
        rate = self._rate_bytes
        if self._shaper is not None or rate is None or rtt_s is None or rate > _SLOW_BYTES_PER_S:
            return None
        return int(min(max(_FIRST_FLIGHT_BYTES, rate * (2 * rtt_s + 0.05)), 1 << 22))

    # -- what the link does with it ------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether everything that was sent has left (and is acknowledged, if frames are kept)."""
        return not (
            self.control
            or self.data
            or self._pipe
            or self._wire
            or self._replay
            or self._unacked
            or self._goodbye
        )

    @property
    def stalled_since_s(self) -> float | None:
        """Since when the peer has taken nothing although there is something to send."""
        if self._rate_bytes is None and self._unheard_since_s is not None:
            return self._unheard_since_s
        if self._blocked_since_s is None:
            return None
        return max(self._blocked_since_s, self.last_progress_s)

    def say_goodbye(self, reason: bytes) -> None:
        """Sends GOODBYE behind all that waits."""
        self._goodbye = reason

    def drop_waiting(self) -> None:
        """Forgets what is not on the wire yet, so that GOODBYE is next."""
        for queue in (self.control, self.data, self._unacked, self._replay, self._pipe):
            queue.clear()
        self.unacked_bytes = 0

    def restart(self, received: int, partial_bytes: int, now_s: float) -> None:
        """Begins a connection: what the peer has is dropped, what it lacks is sent again.

        Raises:
            FrameError: if the peer claims to have what was never sent.
        """
        if received > self.sequence:
            raise FrameError(f"the peer claims frame {received}, {self.sequence} was the last")
        self.acknowledge(received)
        self._replay = deque(self._unacked)
        if partial_bytes:
            if not self._replay:
                raise FrameError(f"the peer claims a part of frame {received + 1}, never sent")
            # However short-lived the connections, each brings the stream some bytes further.
            self._replay[0].skip(partial_bytes)
        elif self._replay:
            self._replay[0].skip(0)
        for frame in self._replay:
            frame.unwritten = frame.nbytes
        self.drop_connection()
        self.last_progress_s = now_s
        self.status_due = True

    def drop_connection(self) -> None:
        """Forgets what was about to be written to a connection that has ended."""
        self._pipe.clear()
        self._wire.clear()
        self._frames.clear()
        self.pongs.clear()
        self._wire_bytes = 0
        self._blocked_since_s = self._unheard_since_s = None

    def part_with(self, transport: Transport, reason: bytes) -> None:
        """Tries once to write a last GOODBYE, unless that would cut into another frame.

        The connection is to be closed next, so it does not matter if the socket takes nothing.
        """
        if self._frames and self._frames[0].unwritten != self._frames[0].nbytes:
            return
        frame = signal_frame(Kind.GOODBYE, reason, self._checked)
        with contextlib.suppress(ConnectionEnded):
            transport.send([memoryview(frame.head)])

    def abandon(self) -> None:
        """Drops everything: the link has ended and no view of an array may stay behind."""
        self.drop_connection()
        for queue in (self.control, self.data, self._unacked, self._replay):
            queue.clear()
        self.unacked_bytes = 0
        self._goodbye = None

    def acknowledge(self, sequence: int) -> None:
        """Drops the frames up to a sequence number that the peer has received."""
        if sequence == self.sequence:
            self._first_flight_bytes = 0
            self._unheard_since_s = None
        while self._unacked and self._unacked[0].sequence <= sequence:
            frame = self._unacked.popleft()
            self.unacked_bytes -= frame.kept_bytes
            self._complete(frame)

    # -- writing -------------------------------------------------------------------------------

    def flush(self, transport: Transport, budget_bytes: int) -> float | None:
        """Writes what may leave now.

        Returns:
            When to call again: 0 at once (the budget is used up), a time of the monotonic clock,
            infinity if there is nothing to do, None if the socket takes no more for now.

        Raises:
            ConnectionEnded: if the connection is broken.
        """
        while True:
            now = time.monotonic()
            again_s = self._fill(now)
            if not self._wire:
                self._unblock(now)
                return again_s
            if budget_bytes <= 0:
                return 0.0
            views = (
                list(self._wire)
                if len(self._wire) <= MAX_BUFFERS
                else [self._wire[index] for index in range(MAX_BUFFERS)]
            )
            offered = sum(map(len, views))
            taken = transport.send(views)
            del views  # on_sent promises that no view is left
            if taken is None:
                if self._blocked_since_s is None:
                    self._blocked_since_s = now
                return None
            budget_bytes -= taken
            self._written(taken, now)
            if taken < offered:  # the kernel is full
                self._blocked_since_s = time.monotonic()
                return None

    def _unblock(self, now_s: float) -> None:
        if self._blocked_since_s is not None:
            self.blocked_s += now_s - self._blocked_since_s
            self._blocked_since_s = None

    def _written(self, taken: int, now_s: float) -> None:
        self._unblock(now_s)
        self.last_progress_s = now_s
        self.bytes_out += taken
        self._wire_bytes -= taken
        rest = taken
        while rest:
            view = self._wire[0]
            if len(view) > rest:
                self._wire[0] = view[rest:]
                break
            rest -= len(view)
            self._wire.popleft()
        while taken:
            frame = self._frames[0]
            count = min(taken, frame.unwritten)
            frame.unwritten -= count
            taken -= count
            if frame.unwritten:
                break
            self._frames.popleft()
            self.frames_out += 1
            if frame.end_s is None:
                frame.end_s = time.monotonic()
            if not self.keep:
                self._complete(frame)

    def _complete(self, frame: Frame) -> None:
        """Ends a message with its last frame; from here on the link holds no view of it."""
        message = frame.message
        if message is None or not frame.last:
            return
        self.messages_out += 1
        self.payload_out_bytes += message.header.total
        self.raw_out_bytes += message.raw_bytes
        sending = message.sending
        sending.end_s = frame.end_s if frame.end_s is not None else time.monotonic()
        message.payload = None
        frame.let_go()
        if message.final:
            self.queue_s += max(0.0, sending.start_s - sending.queued_s)
            if sending.on_sent is not None:
                sending.on_sent(sending.start_s, sending.end_s, sending.wire_bytes)

    def _fill(self, now_s: float) -> float:
        """Moves frames to the wire; returns when there will be more to do."""
        shaper = self._shaper
        if shaper is None:
            # What an emulated link that was lifted since still holds has to leave first.
            self._drain_pipe(now_s)
            if self._pipe:
                return self._pipe[0][0]
            while self._wire_bytes < _COALESCE_BYTES:
                frame = self._pick(now_s)
                self._waiting = frame is not None
                if frame is None:
                    break
                note_start(frame, now_s)
                self._put_on_wire(frame)
            return _IDLE
        while shaper.next_free_s <= now_s and self._wire_bytes < _COALESCE_BYTES:
            frame = self._pick(now_s)
            if frame is None:
                self._waiting = False
                break
            queued_s = 0.0 if frame.message is None else frame.message.sending.queued_s
            start, end = shaper.admit(now_s, frame.nbytes, self._waiting, queued_s)
            self._waiting = True
            frame.end_s = end
            note_start(frame, start)
            # A late thread makes up for lost rate, but no frame travels before it exists.
            self._pipe.append((max(end, now_s) + shaper.shape.delay_s, frame))
        else:
            if self._wire_bytes >= _COALESCE_BYTES:
                # The socket is slower than the emulated link: the virtual clock must not run on.
                self._waiting = False
        self._drain_pipe(now_s)
        again_s = self._pipe[0][0] if self._pipe else _IDLE
        # If the link is free and nothing was picked, only an event can change that: no timer.
        if shaper.next_free_s > now_s and (self._waiting or self._has_frames()):
            again_s = min(again_s, shaper.next_free_s)
        return again_s

    def _has_frames(self) -> bool:
        """Whether something waits to be picked, with or without credit."""
        return bool(
            self.control
            or self.data
            or self._replay
            or self.pongs
            or self.ping_due
            or self.status_due
            or self._goodbye
        )

    def _drain_pipe(self, now_s: float) -> None:
        while self._pipe and self._pipe[0][0] <= now_s:
            self._put_on_wire(self._pipe.popleft()[1])

    def _put_on_wire(self, frame: Frame) -> None:
        self._wire.append(memoryview(frame.head))
        if frame.payload is not None and len(frame.payload):
            self._wire.append(frame.payload)
        self._wire_bytes += frame.nbytes
        self._frames.append(frame)

    # -- choosing ------------------------------------------------------------------------------

    def _pick(self, now_s: float) -> Frame | None:
        if self.ping_due:
            self.ping_due = False
            return signal_frame(Kind.PING, PING.pack(now_s), self._checked)
        if self.pongs:
            asked_s, arrived_s = self.pongs.popleft()
            pong = PONG.pack(asked_s, arrived_s, now_s)
            return signal_frame(Kind.PONG, pong, self._checked)
        if self.status_due:
            self.status_due = False
            return signal_frame(Kind.STATUS, self._status(), self._checked)
        if self._replay:
            frame = self._replay.popleft()
            self.repeated_frames += 1
            self.repeated_bytes += frame.nbytes
            return frame
        if self.unacked_bytes >= self._replay_bytes:
            return None
        lane = self.control or self.data
        if not lane:
            if self._goodbye is not None:
                reason, self._goodbye = self._goodbye, None
                return signal_frame(Kind.GOODBYE, reason, self._checked)
            return None
        message = lane[0]
        # Looked at after the lane: whoever saw this message there sees the change before it, too.
        if self.shapes_due:
            return None
        if (
            self._rate_bytes is None
            and self._shaper is None
            and self._first_flight_bytes >= _FIRST_FLIGHT_BYTES
        ):
            if self._unheard_since_s is None:
                self._unheard_since_s = now_s
            return None
        if message.payload is None or (message.offset == 0 and not self._commit(message, now_s)):
            return None
        return self._cut(message, lane, now_s)

    def _commit(self, message: Outgoing, now_s: float) -> bool:
        """Takes credit for a message, if there is any; an empty window takes one of any size."""
        if message.cost:
            used = self.committed_bytes - self.peer_released_bytes
            if used and used + message.cost > self.peer_window_bytes:
                if self._no_credit_since_s is None:
                    self._no_credit_since_s = now_s
                return False
            self.committed_bytes += message.cost
            if self._no_credit_since_s is not None:
                self.credit_wait_s += now_s - self._no_credit_since_s
                self._no_credit_since_s = None
        return True

    def _cut(self, message: Outgoing, lane: deque[Outgoing], now_s: float) -> Frame:
        """Cuts the next frame off a message."""
        assert message.payload is not None
        offset, total = message.offset, message.header.total
        length = min(total - offset, self._chunk_bytes)
        self.sequence += 1
        flags, checksum = message.header.flags, 0
        payload = message.payload[offset : offset + length]
        if self._waiting:
            flags |= _BACK_TO_BACK
        if self._checked:
            flags |= _CHECKED
            checksum = checksum_of(payload)
        if offset == 0:
            header = message.header._replace(
                flags=flags,
                sequence=self.sequence,
                length=length,
                clock_s=now_s,
                checksum=checksum,
            )
            head = pack_header(header, message.shape)
        else:
            header = Header(
                kind=Kind.CHUNK,
                flags=flags & (_CONTROL_LANE | _BACK_TO_BACK | _CHECKED),
                sequence=self.sequence,
                offset=offset,
                total=total,
                length=length,
                clock_s=now_s,
                checksum=checksum,
            )
            head = pack_header(header)
        frame = Frame(head, payload, header, message)
        message.offset = offset + length
        message.sending.wire_bytes += frame.nbytes
        if message.offset == total:
            frame.last = True
            lane.popleft()
            self.departed_raw_bytes += message.raw_bytes
        self._first_flight_bytes += frame.nbytes
        if self.keep:
            self._unacked.append(frame)
            self.unacked_bytes += frame.nbytes
        return frame
