"""The shared state of a link's two halves: outgoing messages, credit, and its end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from comms.errors import PeerLost
from comms.link.outgoing import Outgoing


class SendQueue:
    """Callers add messages under the lock; the I/O thread takes them without waiting.

    Args:
      window_bytes: Credit granted by the peer.
      wake: Wakes the I/O thread for new messages; called from any thread.

    Attributes:
      control: Control messages in the order of sending.
      data: Tensors and bundles in the order of sending.
      shapes_due: Pending changes of shape, which hold all messages.
      window_bytes: Credit granted by the peer.
      reserved_bytes: Credit of all messages so far.
      released_bytes: Total credit returned by the peer.
      departed_raw_bytes: Bytes before the codec of messages that have been cut into frames.
      peak_bytes: Maximum of waiting bytes before the codec since ``begin_peak``.
      closing: Whether this side has closed the link.
      error: The reason why the link has ended; None before.
      ended: Set once the link has ended and has no view of an array.
    """

    def __init__(self, window_bytes: int, wake: Callable[[], None]) -> None:
        self.control: deque[Outgoing] = deque()
        self.data: deque[Outgoing] = deque()
        self.shapes_due = 0
        self.window_bytes = window_bytes
        self.reserved_bytes = 0
        self.released_bytes = 0
        self.departed_raw_bytes = 0
        self.peak_bytes = 0
        self.closing = False
        self.error: PeerLost | None = None
        self.ended = threading.Event()
        self.wake = wake
        self._submitted_raw_bytes = 0
        self._lock = threading.Lock()

    # -- callers -------------------------------------------------------------------------------

    def put(
        self,
        messages: list[Outgoing],
        *,
        control: bool = False,
        closed: Callable[[], PeerLost],
    ) -> None:
        """Appends messages.

        Args:
          messages: The messages, in order.
          control: Whether they overtake tensors.
          closed: Returns the error for a link that this side has closed.

        Raises:
          PeerLost: If the link has ended.
        """
        with self._lock:
            if self.error is not None or self.closing:
                raise self.error or closed()
            self.reserved_bytes += sum(message.cost for message in messages)
            self._submitted_raw_bytes += sum(message.raw_bytes for message in messages)
            self.peak_bytes = max(self.peak_bytes, self.waiting_bytes)
            (self.control if control else self.data).extend(messages)

    @property
    def waiting_bytes(self) -> int:
        """Bytes before the codec of messages that have not been cut into frames yet."""
        return self._submitted_raw_bytes - self.departed_raw_bytes

    @property
    def used_bytes(self) -> int:
        """Credit in use, including waiting messages."""
        return self.reserved_bytes - self.released_bytes

    def can_take(self, nbytes: float) -> bool:
        """Returns whether a tensor of ``nbytes`` has credit; an empty window accepts any."""
        used = self.used_bytes
        return used == 0 or used + nbytes <= self.window_bytes

    def hold(self) -> None:
        """Holds all messages that are added from now on until ``unhold``."""
        with self._lock:
            self.shapes_due += 1

    def begin_peak(self) -> None:
        """Begins a new maximum of waiting bytes, with those that wait now."""
        with self._lock:
            self.peak_bytes = self.waiting_bytes

    # -- the I/O thread ------------------------------------------------------------------------

    def unhold(self) -> None:
        """Ends a ``hold``."""
        with self._lock:
            self.shapes_due -= 1

    def release(self, released_bytes: int) -> None:
        """Records the total credit returned by the peer."""
        with self._lock:
            self.released_bytes = released_bytes

    def close(self) -> None:
        """Rejects further messages."""
        with self._lock:
            self.closing = True

    def end(self, error: PeerLost) -> None:
        """Records the reason why the link has ended, and wakes all waiting threads."""
        with self._lock:
            self.error = error
