"""Gathers frames, writes them to the socket, and counts them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from comms.link.outgoing import Frame
from comms.wire.transport import MAX_BUFFERS, Transport


class FrameWriter:
    """Used by the I/O thread, but for the counters.

    Args:
      on_written: Called with each frame when its last byte has left.

    Attributes:
      waiting_bytes: Bytes of frames that are not written yet.
      bytes_out: Total bytes written.
      frames_out: Total frames written.
      blocked_s: Time during which the kernel accepted no bytes although there were some.
      blocked_since_s: Start of the current such time; None if there is none.
      last_progress_s: Time of the last accepted bytes, on the monotonic clock.
    """

    def __init__(self, on_written: Callable[[Frame], None]) -> None:
        self._on_written = on_written
        self._views: deque[memoryview] = deque()
        self._frames: deque[Frame] = deque()
        self.waiting_bytes = 0
        self.bytes_out = 0
        self.frames_out = 0
        self.blocked_s = 0.0
        self.blocked_since_s: float | None = None
        self.last_progress_s = time.monotonic()

    @property
    def within_frame(self) -> bool:
        """Whether a frame has been written in part."""
        return bool(self._frames) and self._frames[0].unwritten != self._frames[0].nbytes

    @property
    def holds_message(self) -> bool:
        """Whether a frame of a message waits to be written, or its rest."""
        return any(frame.message is not None for frame in self._frames)

    def put(self, frame: Frame) -> None:
        """Appends a frame."""
        self._views.append(memoryview(frame.head))
        if frame.payload is not None and len(frame.payload):
            self._views.append(frame.payload)
        self.waiting_bytes += frame.nbytes
        self._frames.append(frame)

    def clear(self) -> None:
        """Drops waiting frames, since their connection has ended."""
        self._views.clear()
        self._frames.clear()
        self.waiting_bytes = 0
        self.blocked_since_s = None

    def write(self, transport: Transport, now_s: float) -> tuple[int, bool]:
        """Writes from the front; returns the number of bytes, and whether the kernel is full.

        Raises:
          ConnectionEnded: If the connection is broken.
        """
        views = (
            list(self._views)
            if len(self._views) <= MAX_BUFFERS
            else [self._views[index] for index in range(MAX_BUFFERS)]
        )
        offered = sum(map(len, views))
        taken = transport.send(views)
        del views  # on_sent guarantees that no view is left
        if taken is None:
            if self.blocked_since_s is None:
                self.blocked_since_s = now_s
            return 0, True
        self._written(taken, now_s)
        if taken < offered:
            self.blocked_since_s = time.monotonic()
            return taken, True
        return taken, False

    def unblock(self, now_s: float) -> None:
        """Counts the time during which the kernel accepted no bytes."""
        if self.blocked_since_s is not None:
            self.blocked_s += now_s - self.blocked_since_s
            self.blocked_since_s = None

    def _written(self, taken: int, now_s: float) -> None:
        self.unblock(now_s)
        self.last_progress_s = now_s
        self.bytes_out += taken
        self.waiting_bytes -= taken
        rest = taken
        while rest:
            view = self._views[0]
            if len(view) > rest:
                self._views[0] = view[rest:]
                break
            rest -= len(view)
            self._views.popleft()
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
            self._on_written(frame)
