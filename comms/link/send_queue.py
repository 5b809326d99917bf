"""What the two halves of a link share: messages to be sent, their credit, and why it ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from comms.errors import PeerLost
from comms.link.outgoing import Outgoing


class SendQueue:
    """Callers put messages in under the lock; the I/O thread takes them out, and never waits.

    Args:
      window_bytes: Credit that the peer gives.
      wake: Has the I/O thread look at what is to be sent; called from any thread.

    Attributes:
      control: Control messages in the order of sending.
      data: Tensors and bundles in the order of sending.
      shapes_due: Changes of shape that were asked for and not made yet; nothing leaves before.
      window_bytes: Credit that the peer gives.
      reserved_bytes: Credit that all messages ever put in take.
      released_bytes: Credit that the peer has given back, in all.
      departed_raw_bytes: Bytes before the codec of what the I/O thread has cut into frames.
      peak_bytes: The most bytes before the codec that ever waited.
      closing: Whether this side has ended the link, and takes nothing more.
      error: Why the link has ended; None while it has not.
      ended: Set once the link has ended and holds no view of an array.
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
        """Adds messages behind those that wait.

        Args:
          messages: What is sent, in order.
          control: Whether they overtake tensors.
          closed: Makes the error for a link that this side has closed.

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
        """Bytes before the codec of what the I/O thread has not cut into frames yet."""
        return self._submitted_raw_bytes - self.departed_raw_bytes

    @property
    def used_bytes(self) -> int:
        """Credit that is taken, by what waits here too."""
        return self.reserved_bytes - self.released_bytes

    def can_take(self, nbytes: float) -> bool:
        """Returns whether a tensor of ``nbytes`` has credit; an empty window takes any."""
        used = self.used_bytes
        return used == 0 or used + nbytes <= self.window_bytes

    def hold(self) -> None:
        """Lets nothing that is put in from now on leave before ``unhold``."""
        with self._lock:
            self.shapes_due += 1

    # -- the I/O thread ------------------------------------------------------------------------

    def unhold(self) -> None:
        """Ends a ``hold``."""
        with self._lock:
            self.shapes_due -= 1

    def release(self, released_bytes: int) -> None:
        """Records how much credit the peer has given back, in all."""
        with self._lock:
            self.released_bytes = released_bytes

    def close(self) -> None:
        """Takes nothing more."""
        with self._lock:
            self.closing = True

    def end(self, error: PeerLost) -> None:
        """Records why the link has ended, for everyone who still asks or waits."""
        with self._lock:
            self.error = error
