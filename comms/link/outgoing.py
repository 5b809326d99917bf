"""Outgoing messages and their frames."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from comms.errors import FrameError
from comms.wire.frame import Flag, Header, Kind, checksum_of, pack_header

# Plain numbers: the operators of IntFlag cost microseconds, and these are used for every frame.
_CHECKED = int(Flag.CHECKED)
_KEPT = int(Flag.CONTROL_LANE | Flag.CHECKED)
OnSent: TypeAlias = Callable[[float, float, int], None]
"""Called with the times of the first and the last byte, and the bytes with headers."""


class Sending:
    """Times and bytes of a message or a whole bundle; shared by its parts.

    Created in the call that sends the message, so that ``queued_s`` is the time of that call.
    """

    __slots__ = ("end_s", "on_sent", "queued_s", "start_s", "wire_bytes")

    def __init__(self, on_sent: OnSent | None) -> None:
        self.on_sent = on_sent
        self.queued_s = time.monotonic()
        self.start_s = -1.0
        self.end_s = 0.0
        self.wire_bytes = 0


class Outgoing:
    """A message that waits or is being sent.

    ``payload`` is None while the codec worker encodes it.
    """

    __slots__ = (
        "cost", "final", "header", "offset", "payload", "raw_bytes", "sending", "shape",
    )  # fmt: skip

    def __init__(
        self,
        header: Header,
        shape: tuple[int, ...],
        payload: memoryview | None,
        sending: Sending,
        *,
        raw_bytes: int,
        cost: int = 0,
        final: bool = True,
    ) -> None:
        self.header = header
        self.shape = shape
        self.payload = payload
        self.sending = sending
        self.raw_bytes = raw_bytes
        self.cost = cost
        self.final = final
        self.offset = 0


class Frame:
    """A sent frame; kept until acknowledged if the stream can resume."""

    __slots__ = (
        "end_s", "first", "head", "header", "kept_bytes", "last", "message", "nbytes", "payload",
        "sequence", "unwritten",
    )  # fmt: skip

    def __init__(
        self,
        head: bytes,
        payload: memoryview | None,
        header: Header | None = None,
        message: Outgoing | None = None,
    ) -> None:
        self.head = head
        self.payload = payload
        self.header = header
        self.sequence = 0 if header is None else header.sequence
        self.first = head, payload
        self.message = message
        self.last = False
        self.nbytes = len(head) + (0 if payload is None else len(payload))
        self.unwritten = self.kept_bytes = self.nbytes
        self.end_s: float | None = None

    def skip(self, nbytes: int) -> None:
        """Drops the first payload bytes, counted from the original frame.

        Raises:
          FrameError: If the frame is not longer than that.
        """
        head, payload = self.first
        if nbytes:
            header = self.header
            assert header is not None and payload is not None
            if not nbytes < header.length:
                raise FrameError(f"the peer claims {nbytes} bytes of frame {header.sequence}")
            # The checksum remains that of the whole payload: earlier parts may have been damaged.
            head = pack_header(
                Header(
                    kind=Kind.CHUNK,
                    flags=header.flags & _KEPT,
                    sequence=header.sequence,
                    offset=header.offset + nbytes,
                    total=header.total,
                    length=header.length - nbytes,
                    clock_s=header.clock_s,
                    checksum=header.checksum,
                )
            )
            payload = payload[nbytes:]
        self.head, self.payload = head, payload
        self.nbytes = len(head) + (0 if payload is None else len(payload))

    def let_go(self) -> None:
        """Drops all views of the array."""
        self.payload = None
        self.first = self.head, None


def note_start(frame: Frame, start_s: float) -> None:
    """Records the start of a message, with its first frame."""
    if frame.message is not None and frame.message.sending.start_s < 0:
        frame.message.sending.start_s = start_s


def signal_frame(kind: Kind, payload: bytes, checked: bool) -> Frame:
    """Returns a frame without a message: status, ping, pong or goodbye."""
    header = Header(kind=kind, total=len(payload), length=len(payload))
    if checked:
        header = header._replace(flags=_CHECKED, checksum=checksum_of(payload))
    return Frame(pack_header(header) + payload, None)
