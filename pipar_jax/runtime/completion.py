"""The thread that waits for computations, stamps them and stretches them on emulated slow hosts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from pipar_jax.schedule.actions import COMPUTE, Action
from pipar_jax.schedule.trace import Timed
from stages.trees import PyTree


class Work(NamedTuple):
    """A dispatched computation.

    Attributes:
      action: Its action.
      probe: An array that is ready when the computation is, and that is not donated meanwhile.
      dispatched_s: When it was dispatched, on the monotonic clock.
      samples: Samples in its micro-batch.
      minimum_s: Least duration in seconds on this (emulated) host.
      then: Called on the completion thread once it is over, or None.
    """

    action: Action
    probe: PyTree
    dispatched_s: float
    samples: int
    minimum_s: float
    then: Callable[[], None] | None


class Completion:
    """Stamps each computation [max(dispatched, previous end), ready], in order of dispatch.

    Waiting here, and not where actions are dispatched, keeps the dispatch thread free to queue the
    next computation behind the running computation.

    Attributes:
      actions: Number of completed computations.

    Args:
      name: Host's name, for the thread's.
      record: Receives each timed action.
      over: Called with each completed action.
      failed: Receives the exception of a computation or its ``then``; nothing is stamped after it.
    """

    def __init__(
        self,
        name: str,
        record: Callable[[Timed], None],
        over: Callable[[Action], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._record, self._over, self._failed = record, over, failed
        self._queue: queue.SimpleQueue[Work | Callable[[], None] | None] = queue.SimpleQueue()
        self._previous_end_s = 0.0
        self._overruns, self._longest_s = 0, 0.0
        self.actions = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"pipar-completion-{name}", daemon=True
        )
        self._thread.start()

    def take(self) -> tuple[int, float]:
        """Returns and resets the round's overruns and the seconds of its longest action."""
        found, (self._overruns, self._longest_s) = (self._overruns, self._longest_s), (0, 0.0)
        return found

    def put(self, work: Work) -> None:
        """Queues a computation that was just dispatched."""
        self._queue.put(work)

    def then(self, call: Callable[[], None]) -> None:
        """Calls a function on the completion thread after all queued computations."""
        self._queue.put(call)

    def close(self) -> None:
        """Ends the thread; queued computations are waited for, but not stretched or reported."""
        self._closing.set()
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        """Runs the thread: waits for each computation in turn."""
        try:
            while (work := self._queue.get()) is not None:
                if isinstance(work, Work):
                    self._finish(work)
                else:
                    work()
                del work  # it holds an array, and the next computation may be far off
        except BaseException as error:  # handed to whoever joins the host
            self._failed(error)

    def _finish(self, work: Work) -> None:
        """Waits for a computation, stretches it, and reports that it is over."""
        jax.block_until_ready(work.probe)  # type: ignore[no-untyped-call]
        if self._closing.is_set():
            return
        end = time.monotonic()
        start = max(work.dispatched_s, self._previous_end_s)
        if work.minimum_s > 0.0:
            wanted = start + work.minimum_s
            if end > wanted:
                self._overruns += 1
            # The next computation may run meanwhile on the real processor; its own stretch begins
            # where this stretch ends, so emulated time stays that of a single slow processor.
            while (left := wanted - time.monotonic()) > 0:
                if self._closing.wait(left):
                    return
            end = max(end, wanted)
        self._previous_end_s = end
        self._longest_s = max(self._longest_s, end - start)
        self.actions += 1
        if work.action.kind in COMPUTE:
            self._record(Timed(work.action, start, end, 0, work.samples))
        if work.then is not None:
            work.then()
        self._over(work.action)
