"""What a device's or node's main thread reads: mail of the coordinator, errors of its threads."""

from __future__ import annotations

import queue
from collections.abc import Callable

from comms import Link, Message, MessageKind
from pipar_jax.errors import ProtocolError
from pipar_jax.schedule.plan import COORDINATOR, long_name

#: Control messages and bundles of the coordinator that may wait to be read.
MOST_WAITING, MOST_BUNDLES = 4096, 4


class CoordinatorMail:
    """A queue of messages and errors, with no more messages than somebody reads.

    Args:
      name: The host's name.
      tensors: Receives the coordinator's tensors; returns what is wrong with one.
    """

    def __init__(self, name: str, tensors: Callable[[Message], str | None]) -> None:
        self._name, self._tensors = name, tensors
        self._queue: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()
        self._waiting = [0, 0]  # control messages and bundles that nobody has read yet

    def on_message(self, message: Message) -> None:
        """Routes what arrives from the coordinator; runs on the I/O thread."""
        if message.kind == MessageKind.TENSOR:
            if (reason := self._tensors(message)) is not None:
                self.refuse(message.link, reason)
            return
        large = message.kind == MessageKind.BUNDLE
        self._waiting[large] += 1
        if self._waiting[large] > (MOST_BUNDLES if large else MOST_WAITING):
            message.release()
            message.link.refuse("too much waits to be read")
            sent = f"{long_name(COORDINATOR)} sent {long_name(self._name)}"
            self.put(ProtocolError(f"{sent} more than it reads"))
            return
        self._queue.put(message)

    def refuse(self, link: Link, reason: str) -> None:
        """Ends the coordinator's link, and the host's part, for what it sent; on any thread."""
        link.refuse(reason)
        self.put(ProtocolError(f"{long_name(COORDINATOR)} sent {reason}"))

    def put(self, error: BaseException) -> None:
        """Queues what has ended a link or a thread; any thread may call it."""
        self._queue.put(error)

    def get(self, timeout_s: float) -> Message | BaseException | None:
        """Returns the next item; None if there is none in time."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, Message):
            self._waiting[item.kind == MessageKind.BUNDLE] -= 1
        return item
