"""Compiling the stages of a coming plan on a thread of its own, while the present one trains."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable

from pipar_jax.plan import Plan

#: Added to the thread's niceness where the system has such per thread: training goes first.
NICENESS = 10


class Ahead:
    """A thread that compiles one plan after another; it starts with the first.

    Args:
      name: Host's name, for the thread's.
      compile: Compiles a plan's stages; runs on the thread.
      done: Told of each plan's number once it is compiled.
      failed: Given what went wrong.
    """

    def __init__(
        self,
        name: str,
        compile: Callable[[Plan], None],
        done: Callable[[int], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """See the class."""
        self._name, self._compile, self._done, self._failed = name, compile, done, failed
        self._queue: queue.SimpleQueue[tuple[int, Plan] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, number: int, plan: Plan) -> None:
        """Asks for a plan; the caller's thread does not wait."""
        if self._thread is None:
            name = f"pipar-ahead-{self._name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._queue.put((number, plan))

    def close(self) -> None:
        """Ends the thread; a compilation that is under way is waited for."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        lower_priority()
        try:
            while (item := self._queue.get()) is not None:
                number, plan = item
                self._compile(plan)
                self._done(number)
        except BaseException as error:  # handed to whoever joins the host
            self._failed(error)


def lower_priority() -> None:
    """Makes the calling thread give way to others, where the system can do that to a thread."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):  # it is an advantage, not a need
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
