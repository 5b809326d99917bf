"""Frames about the connection itself: heartbeats, the peer's state, its goodbye."""

from __future__ import annotations

import time
from collections.abc import Callable

from comms.errors import FrameError
from comms.link.connection import Connection
from comms.link.heartbeat import Heartbeat
from comms.link.outbox import Outbox
from comms.link.send_queue import SendQueue
from comms.wire import bounded_json
from comms.wire.bounded_json import one_line
from comms.wire.frame import MAX_RATE, STATUS, Header, Kind


class Signals:
    """Takes the frames of a stream that carry no message; only the I/O thread calls its method.

    Args:
      queue: What callers have sent; gets the credit that the peer returns.
      outbox: What has left; learns what has arrived, and how fast the peer receives.
      connection: The current connection.
      heartbeat: Takes its own frames.
      on_credit: Called when the peer has returned credit.
      on_goodbye: Called with the reason for which the peer closes the link.
    """

    def __init__(
        self,
        queue: SendQueue,
        outbox: Outbox,
        connection: Connection,
        heartbeat: Heartbeat,
        on_credit: Callable[[], None],
        on_goodbye: Callable[[str], None],
    ) -> None:
        self._queue, self._outbox, self._connection = queue, outbox, connection
        self._heartbeat, self._on_credit, self._on_goodbye = heartbeat, on_credit, on_goodbye

    def take(self, header: Header, payload: bytes) -> None:
        """Acts on a frame.

        Raises:
          FrameError: It is not a valid signal.
        """
        if self._heartbeat.take(header, payload):
            return
        if header.kind == Kind.STATUS and len(payload) == STATUS.size:
            self._status(*STATUS.unpack(payload))
        elif header.kind == Kind.GOODBYE:
            reason = bounded_json.decode(payload, "a GOODBYE frame").get("reason")
            if not isinstance(reason, str):
                raise FrameError("a GOODBYE frame without a reason")
            self._on_goodbye(one_line(reason))
        else:
            raise FrameError(f"a {Kind(header.kind).name} frame of {len(payload)} bytes")

    def _status(self, received: int, released_bytes: int, rate: float) -> None:
        outbox = self._outbox
        if received > outbox.sequence or released_bytes > outbox.committed_bytes:
            raise FrameError(
                f"the peer acknowledges frame {received} of {outbox.sequence} and returns "
                f"{released_bytes} of {outbox.committed_bytes} bytes"
            )
        if not 0 <= rate <= MAX_RATE:
            raise FrameError(f"the peer reports a rate of {rate} bytes per second")
        outbox.acknowledge(received)
        if rate:
            outbox.pace.set_rate(rate, time.monotonic())
            self._connection.limit()
        if released_bytes > self._queue.released_bytes:
            self._queue.release(released_bytes)
            self._on_credit()
