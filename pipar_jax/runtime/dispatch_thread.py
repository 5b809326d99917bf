"""The thread on which a host does all its work: what is posted to it first, then what is ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from pipar_jax.errors import RunError


class DispatchThread:
    """Runs posted calls in order, and after them what a host has ready.

    All but ``start`` may be called on any thread.

    Args:
      name: The host's name.
      failed: Takes the first error of any of the host's threads; must only post.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._name, self._failed = name, failed
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._mailbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._dispatch: Callable[[], None] = _nothing
        self._thread = threading.Thread(target=self._run, name=f"pipar-host-{name}", daemon=True)

    def start(self, dispatch: Callable[[], None]) -> None:
        """Starts the thread.

        Args:
          dispatch: Dispatches what is ready; called each time that the mail has been read.
        """
        self._dispatch = dispatch
        self._thread.start()

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Queues a call."""
        self._mailbox.put((function, args))

    def wake(self) -> None:
        """Lets it look again for what is ready."""
        self.post(_nothing)

    def fail(self, error: BaseException) -> None:
        """Reports the first error of any of the host's threads and stops them."""
        if self._failure is None and not self._stopping.is_set():
            self._failure = error
            self._failed(error)
        self._stopping.set()
        self.wake()

    def check_stopped(self) -> None:
        """Ends a compilation that nobody waits for any more.

        Raises:
          RunError: The host is being closed, or has failed.
        """
        if self._stopping.is_set():
            raise RunError(f"{self._name} was stopped while it compiled")

    def close(self) -> None:
        """Ends the thread once what it does is done."""
        self._stopping.set()
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                function, args = self._mailbox.get()
                function(*args)
                while not self._mailbox.empty():
                    function, args = self._mailbox.get()
                    function(*args)
                del function, args  # a message, perhaps, and the next call may be far off
                if not self._stopping.is_set():
                    self._dispatch()
        except BaseException as error:  # handed to the owner, which raises it where it is joined
            self.fail(error)


def _nothing() -> None:
    """Has nothing to do: the thread wakes up by it."""
