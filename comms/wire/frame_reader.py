"""Reads frames from a connection: parses headers and reads payloads into their buffers."""

from __future__ import annotations

import time
from collections.abc import Callable

from comms.wire.frame import HEADER_BYTES, Header, unpack_header
from comms.wire.transport import Transport

_STAGING_BYTES = 1 << 14


class FrameReader:
    """Reads one stream; outlives its connections.

    A payload is read directly into the memory that ``begin_frame`` returns; the same system call
    reads the next header into a small staging area.

    Args:
      begin_frame: Called with each header and shape; returns the buffer of the payload.
      end_frame: Called with the header when the payload is complete.
    """

    def __init__(
        self,
        begin_frame: Callable[[Header, tuple[int, ...]], memoryview],
        end_frame: Callable[[Header], None],
    ) -> None:
        self._begin_frame = begin_frame
        self._end_frame = end_frame
        self.bytes_in = 0
        self.last_read_s = time.monotonic()
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._start = 0
        self._end = 0
        self._ahead_bytes = _STAGING_BYTES
        self._wake_bytes = 1
        self._header: Header | None = None
        self._target: memoryview | None = None
        self._filled = 0

    def settle(self) -> tuple[Header, int] | None:
        """Ends a connection; returns the part of an incomplete frame that was read, if any."""
        rest = None if self._header is None else (self._header, self._filled)
        self._start = self._end = 0
        self._header = self._target = None
        self.expect()
        return rest

    def restart(self, leftover: bytes) -> None:
        """Starts a connection of which ``leftover`` has already been read."""
        self.last_read_s = time.monotonic()
        view = memoryview(leftover)
        while view:
            taken = min(len(view), _STAGING_BYTES - self._end)
            self._staging[self._end : self._end + taken] = view[:taken]
            self._end += taken
            view = view[taken:]
            self._parse()
            self._compact()

    def expect(self, head_bytes: int = _STAGING_BYTES, wake_bytes: int = 1) -> None:
        """Sets the read sizes; called by ``begin_frame``.

        Args:
          head_bytes: Number of bytes to read after a payload: after a large one only the next head,
            so that the next payload starts in its aligned buffer without a copy.
          wake_bytes: Bytes of a payload that accumulate before this thread is woken.
        """
        self._ahead_bytes = head_bytes
        self._wake_bytes = wake_bytes

    def pump(self, transport: Transport, budget_bytes: int) -> bool:
        """Reads until the connection would block or the budget is used up.

        Returns:
          Whether more data may be available.

        Raises:
          ConnectionEnded: If the connection has ended.
          FrameError: If the peer sent an invalid frame.
        """
        while budget_bytes > 0:
            target = self._target
            if target is not None:
                rest = target[self._filled :]
                room = self._staging[: self._ahead_bytes]
                offered = len(rest) + len(room)
                count = transport.receive(rest, room)
                if count is not None:
                    inside = min(count, len(rest))
                    self._filled += inside
                    self._end = count - inside
            else:
                self._compact()
                room = self._staging[self._end : max(self._ahead_bytes, self._end + HEADER_BYTES)]
                offered = len(room)
                count = transport.receive(room)
                if count is not None:
                    self._end += count
            if count is not None:
                self.bytes_in += count
                budget_bytes -= count
                self.last_read_s = time.monotonic()
                self._parse()
            # A short read emptied the kernel's buffer; another read would only block.
            if count is None or count < offered:
                unread = 0 if self._target is None else len(self._target) - self._filled
                transport.wake_at(max(1, min(unread, self._wake_bytes)))
                return False
        return True

    def _compact(self) -> None:
        if self._start:
            rest = self._end - self._start
            self._staging[:rest] = bytes(self._staging[self._start : self._end])
            self._start, self._end = 0, rest

    def _parse(self) -> None:
        """Processes the data, frame by frame."""
        while True:
            target = self._target
            if target is not None:
                count = min(self._end - self._start, len(target) - self._filled)
                if count:
                    target[self._filled : self._filled + count] = self._staging[
                        self._start : self._start + count
                    ]
                    self._filled += count
                    self._start += count
                if self._filled < len(target):
                    break
                header, self._header, self._target = self._header, None, None
                assert header is not None
                self._end_frame(header)
                continue
            available = self._end - self._start
            if available < HEADER_BYTES:
                break
            parsed = unpack_header(self._staging[self._start : self._end])
            if parsed is None:
                break
            header, shape = parsed
            head_bytes = HEADER_BYTES + 8 * header.rank
            self._target = self._begin_frame(header, shape)
            self._header, self._filled = header, 0
            self._start += head_bytes
        if self._start == self._end:
            self._start = self._end = 0
