"""The sending half of a link: messages to frames, priorities, credit, shaping and replay."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable

from comms.emulation.shaping import LinkShape
from comms.errors import FrameError
from comms.link.frame_writer import FrameWriter
from comms.link.outgoing import Frame, Outgoing, note_start, signal_frame
from comms.link.pace import FIRST_FLIGHT_BYTES, Pace
from comms.link.send_queue import SendQueue
from comms.wire.frame import PING, PONG, Flag, Header, Kind, checksum_of, pack_header
from comms.wire.transport import ConnectionEnded, Transport

# Plain numbers: the operators of IntFlag cost microseconds, and these are used for every frame.
_CONTROL_LANE = int(Flag.CONTROL_LANE)
_BACK_TO_BACK = int(Flag.BACK_TO_BACK)
_CHECKED = int(Flag.CHECKED)
_COALESCE_BYTES = 1 << 16
_IDLE = float("inf")


class Outbox:
    """Chooses the next frame and writes it; used by the I/O thread, except the counters.

    The order is: heartbeats and status, frames to repeat after an interruption, control messages,
    then tensors and bundles in the order of sending. A tensor without credit waits, and so do all
    later ones, so that tensors never overtake each other.

    Args:
      queue: Messages of callers.
      status: Returns the payload of a STATUS frame.
      keep: Whether frames are kept for replay until acknowledged.
      replay_bytes: Limit of kept frames.
      checked: Whether payloads are sent with their checksum.

    Attributes:
      queue: Messages of callers.
      pace: Rate of sending.
      writer: Frames being written.
      committed_bytes: Credit of all messages that have started to leave.
      sequence: Number of the last frame cut.
      checked: Whether payloads are sent with their checksum.
      cut_off: Whether the link has ended with messages that had not left.
    """

    def __init__(
        self,
        queue: SendQueue,
        status: Callable[[], bytes],
        *,
        keep: bool,
        replay_bytes: int,
        checked: bool = False,
    ) -> None:
        self.pace = Pace()
        self.writer = FrameWriter(self._frame_written)
        self.keep = keep
        self.committed_bytes = 0
        self.sequence = 0
        self.messages_out = 0
        self.payload_out_bytes = 0
        self.raw_out_bytes = 0
        self.credit_wait_s = 0.0
        self.queue_s = 0.0
        self.repeated_frames = 0
        self.repeated_bytes = 0
        self.unacked_bytes = 0
        self.status_due = False
        self.ping_due = False
        self.pongs: deque[tuple[float, float]] = deque(maxlen=8)
        self.queue = queue
        self._status = status
        self.checked = checked
        self.cut_off = False
        self._replay_bytes = replay_bytes
        self._unacked: deque[Frame] = deque()
        self._replay: deque[Frame] = deque()
        self._goodbye: bytes | None = None
        self._parted = False  # the goodbye is cut: nothing may follow it
        self._waiting = False
        self._pipe: deque[tuple[float, Frame]] = deque()
        self._first_flight_bytes = 0
        self._no_credit_since_s: float | None = None
        self._unheard_since_s: float | None = None

    def set_shape(self, shape: LinkShape, now_s: float) -> None:
        """Sets the emulated shape."""
        self.pace.set_shape(shape, now_s)
        self._waiting = False

    def ask_for_heartbeat(self) -> None:
        """Sends a ping and a STATUS next, unless this side is closing."""
        if not self.queue.closing:
            self.ping_due = self.status_due = True

    # -- what the link does with it ------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether all messages have left (and are acknowledged, if frames are kept)."""
        return not (
            self.queue.control
            or self.queue.data
            or self._pipe
            or self.writer.waiting_bytes
            or self._replay
            or self._unacked
            or self._goodbye
        )

    @property
    def stalled_since_s(self) -> float | None:
        """Time since which the peer has accepted no bytes although there are some."""
        if self.pace.rate_bytes is None and self._unheard_since_s is not None:
            return self._unheard_since_s
        writer = self.writer
        if writer.blocked_since_s is None:
            return None
        return max(writer.blocked_since_s, writer.last_progress_s)

    def say_goodbye(self, reason: bytes) -> None:
        """Sends GOODBYE after all waiting messages, unless it was sent before."""
        if not self._parted:
            self._goodbye = reason

    @property
    def owes_goodbye(self) -> bool:
        """Whether a GOODBYE waits for the messages before it."""
        return self._goodbye is not None

    def drop_waiting(self) -> None:
        """Drops everything that is not on the wire yet, so that GOODBYE is next."""
        if self._pipe:
            self._parted = False  # a goodbye that was cut is the last frame there
        queue = self.queue
        for waiting in (queue.control, queue.data, self._unacked, self._replay, self._pipe):
            waiting.clear()
        self.unacked_bytes = 0

    def restart(self, received: int, partial_bytes: int, now_s: float) -> None:
        """Starts a connection: drops frames that the peer has, repeats those that it lacks.

        Raises:
          FrameError: If the peer claims frames that were never sent.
        """
        if received > self.sequence:
            raise FrameError(f"the peer claims frame {received}, {self.sequence} was the last")
        self.acknowledge(received)
        self._replay = deque(self._unacked)
        if partial_bytes:
            if not self._replay:
                raise FrameError(f"the peer claims a part of frame {received + 1}, never sent")
            # Each connection makes progress, however short it is.
            self._replay[0].skip(partial_bytes)
        elif self._replay:
            self._replay[0].skip(0)
        for frame in self._replay:
            frame.unwritten = frame.nbytes
        self.drop_connection()
        self.writer.last_progress_s = now_s
        self.status_due = True

    def drop_connection(self) -> None:
        """Drops frames for a connection that has ended."""
        if not self.keep:
            in_pipe = any(frame.message is not None for _, frame in self._pipe)
            self.cut_off = self.cut_off or in_pipe or self.writer.holds_message
        self._pipe.clear()
        self.writer.clear()
        self.pongs.clear()
        self._unheard_since_s = None

    def part_with(self, transport: Transport, reason: bytes) -> None:
        """Attempts once to write a last GOODBYE, unless that would interrupt another frame.

        The connection is closed next, so that it does not matter if the socket accepts nothing.
        """
        if self.writer.within_frame:
            return
        frame = signal_frame(Kind.GOODBYE, reason, self.checked)
        with contextlib.suppress(ConnectionEnded):
            transport.send([memoryview(frame.head)])

    def abandon(self) -> None:
        """Drops everything: the link has ended, and no view of an array may remain."""
        self.drop_connection()
        queue = self.queue
        self.cut_off = self.cut_off or bool(queue.control or queue.data or self._replay)
        for waiting in (queue.control, queue.data, self._unacked, self._replay):
            waiting.clear()
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
        """Writes frames that may leave now.

        Returns:
          The time of the next call: 0 for immediately (the budget is used up), a time of the
            monotonic clock, infinity if there is nothing to do, None if the socket is full.

        Raises:
          ConnectionEnded: If the connection is broken.
        """
        writer = self.writer
        while True:
            now = time.monotonic()
            again_s = self._fill(now)
            if not writer.waiting_bytes:
                writer.unblock(now)
                return again_s
            if budget_bytes <= 0:
                return 0.0
            taken, full = writer.write(transport, now)
            if full:
                return None
            budget_bytes -= taken

    def _frame_written(self, frame: Frame) -> None:
        if not self.keep:
            self._complete(frame)

    def _complete(self, frame: Frame) -> None:
        """Ends a message with its last frame; from here on the link has no view of it."""
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
        """Moves frames to the writer; returns the time of the next frame."""
        shaper, writer = self.pace.shaper, self.writer
        if shaper is None:
            # Frames on a former emulated link have to leave first.
            self._drain_pipe(now_s)
            if self._pipe:
                return self._pipe[0][0]
            while writer.waiting_bytes < _COALESCE_BYTES:
                frame = self._pick(now_s)
                self._waiting = frame is not None
                if frame is None:
                    break
                note_start(frame, now_s)
                writer.put(frame)
            return _IDLE
        while shaper.next_free_s <= now_s and writer.waiting_bytes < _COALESCE_BYTES:
            frame = self._pick(now_s)
            if frame is None:
                self._waiting = False
                break
            queued_s = 0.0 if frame.message is None else frame.message.sending.queued_s
            start, end = shaper.admit(now_s, frame.nbytes, self._waiting, queued_s)
            self._waiting = True
            frame.end_s = end
            note_start(frame, start)
            # A late thread catches up on the rate, but no frame is sent before it exists.
            self._pipe.append((max(end, now_s) + shaper.shape.delay_s, frame))
        else:
            if writer.waiting_bytes >= _COALESCE_BYTES:
                # The socket is slower than the emulated link: the virtual clock must not advance.
                self._waiting = False
        self._drain_pipe(now_s)
        again_s = self._pipe[0][0] if self._pipe else _IDLE
        # If the link is free and no frame was chosen, only an event can change that: no timer.
        if shaper.next_free_s > now_s and (self._waiting or self._has_frames()):
            again_s = min(again_s, shaper.next_free_s)
        return again_s

    def _has_frames(self) -> bool:
        """Whether a message waits, with or without credit."""
        return not self._parted and bool(
            self.queue.control
            or self.queue.data
            or self._replay
            or self.pongs
            or self.ping_due
            or self.status_due
            or self._goodbye
        )

    def _drain_pipe(self, now_s: float) -> None:
        while self._pipe and self._pipe[0][0] <= now_s:
            self.writer.put(self._pipe.popleft()[1])

    # -- choosing ------------------------------------------------------------------------------

    def _pick(self, now_s: float) -> Frame | None:
        if self._parted:  # the peer has shut its side, or is about to: it would answer with a reset
            return None
        if self.ping_due:
            self.ping_due = False
            return signal_frame(Kind.PING, PING.pack(now_s), self.checked)
        if self.pongs:
            asked_s, arrived_s = self.pongs.popleft()
            pong = PONG.pack(asked_s, arrived_s, now_s)
            return signal_frame(Kind.PONG, pong, self.checked)
        if self.status_due:
            self.status_due = False
            return signal_frame(Kind.STATUS, self._status(), self.checked)
        if self._replay:
            frame = self._replay.popleft()
            self.repeated_frames += 1
            self.repeated_bytes += frame.nbytes
            return frame
        if self.unacked_bytes >= self._replay_bytes:
            return None
        queue = self.queue
        lane = queue.control or queue.data
        if not lane:
            if self._goodbye is not None:
                reason, self._goodbye, self._parted = self._goodbye, None, True
                return signal_frame(Kind.GOODBYE, reason, self.checked)
            return None
        message = lane[0]
        # Checked after the lane, so that a change that precedes this message is seen.
        if queue.shapes_due:
            return None
        if (
            self._first_flight_bytes >= FIRST_FLIGHT_BYTES
            and self.pace.rate_bytes is None
            and self.pace.shaper is None
        ):
            if self._unheard_since_s is None:
                self._unheard_since_s = now_s
            return None
        if message.payload is None or (message.offset == 0 and not self._commit(message, now_s)):
            return None
        return self._cut(message, lane, now_s)

    def _commit(self, message: Outgoing, now_s: float) -> bool:
        """Reserves credit for a message, if available; an empty window accepts any size."""
        if message.cost:
            used = self.committed_bytes - self.queue.released_bytes
            if used and used + message.cost > self.queue.window_bytes:
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
        length = min(total - offset, self.pace.chunk_bytes)
        self.sequence += 1
        flags, checksum = message.header.flags, 0
        payload = message.payload[offset : offset + length]
        if self._waiting:
            flags |= _BACK_TO_BACK
        if self.checked:
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
            self.queue.departed_raw_bytes += message.raw_bytes
        self._first_flight_bytes += frame.nbytes
        if self.keep:
            self._unacked.append(frame)
            self.unacked_bytes += frame.nbytes
        return frame
