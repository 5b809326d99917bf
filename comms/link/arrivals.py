"""Complete messages of a link, delivered in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from comms.link.incoming import Assembly, Bundle
from comms.link.message import Message, MessageKind
from comms.link.meter import ClockMeter
from comms.wire.bounded_json import JsonBody

if TYPE_CHECKING:
    from comms.link.inbox import Inbox
    from comms.link.link import Link

_MESSAGE_BYTES = 1024
"""Approximate memory of a waiting message in addition to its payload."""


class Arrivals:
    """Used by the I/O thread, but for the counters.

    Args:
      clock: How the peer's clock differs from ours.
      release: Returns credit; called from any thread.
      waiting_bytes: Maximum size of messages that wait for an owner that has not started the link.

    Attributes:
      inbox: Source of messages; set before the first arrives.
      link: The link of the messages; set before the first arrives.
      messages: Number of delivered messages.
      payload_bytes: Their payload, before decoding.
      raw_bytes: Their size after decoding.
      deaf: Whether messages are dropped, since the peer was refused.
    """

    inbox: Inbox
    link: Link

    def __init__(
        self, clock: ClockMeter, release: Callable[[int], None], waiting_bytes: int
    ) -> None:
        self._clock = clock
        self._release = release
        self._waiting_bytes = waiting_bytes
        self._on_message: Callable[[Message], None] | None = None
        self._early: deque[Message] = deque()
        self._early_bytes = 0
        self.messages = 0
        self.payload_bytes = 0
        self.raw_bytes = 0
        self.deaf = False

    @property
    def paused(self) -> bool:
        """Whether so much waits for the owner that reading pauses."""
        return self._on_message is None and self._early_bytes >= self._waiting_bytes

    def start(self, on_message: Callable[[Message], None]) -> None:
        """Starts delivery, beginning with waiting messages."""
        self._on_message = on_message
        while self._early:
            on_message(self._early.popleft())
        self._early_bytes = 0

    def close(self) -> None:
        """Drops waiting and later messages."""
        self.deaf = True
        self._early.clear()

    def tensor(self, assembly: Assembly) -> None:
        """Delivers a complete tensor."""
        cost, lease = assembly.cost, assembly.lease

        def release() -> None:
            if lease is not None:
                lease.release()
            if cost:
                self._release(cost)

        self.raw_bytes += assembly.raw_bytes
        self.deliver(
            Message(
                MessageKind.TENSOR,
                self.link,
                tag=assembly.tag,
                payloads={"": assembly.payload()},
                nbytes=assembly.header.total,
                first_byte_s=assembly.first_byte_s,
                received_s=self.inbox.last_read_s,
                sent_s=self._local_s(assembly.sent_clock_s),
                release=release,
            )
        )

    def bundle(self, bundle: Bundle) -> None:
        """Delivers a complete bundle."""
        leases = bundle.leases

        def release() -> None:
            for lease in leases:
                lease.release()

        self.raw_bytes += bundle.raw_bytes
        self.deliver(
            Message(
                MessageKind.BUNDLE,
                self.link,
                tag=bundle.tag,
                name=bundle.name,
                body=bundle.body,
                payloads=bundle.payloads,
                nbytes=bundle.nbytes,
                first_byte_s=bundle.first_byte_s,
                received_s=self.inbox.last_read_s,
                sent_s=self._local_s(bundle.sent_clock_s),
                release=release,
            )
        )

    def control(self, body: JsonBody, assembly: Assembly) -> None:
        """Delivers a control message."""
        self.raw_bytes += assembly.raw_bytes
        self.deliver(
            Message(
                MessageKind.CONTROL,
                self.link,
                body=body,
                nbytes=assembly.header.total,
                first_byte_s=assembly.first_byte_s,
                received_s=self.inbox.last_read_s,
                sent_s=self._local_s(assembly.sent_clock_s),
            )
        )

    def deliver(self, message: Message) -> None:
        """Delivers a message, or keeps it until the owner starts the link."""
        if self.deaf:
            message.release()
            return
        self.messages += 1
        self.payload_bytes += message.nbytes
        if self._on_message is not None:
            self._on_message(message)
            return
        self._early.append(message)
        self._early_bytes += message.nbytes + _MESSAGE_BYTES

    def _local_s(self, clock_s: float) -> float | None:
        offset_s = self._clock.offset_s
        return None if offset_s is None else clock_s - offset_s
