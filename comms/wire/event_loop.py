"""The I/O thread: one selector, a heap of timers and a queue of calls from other threads."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import PurePath
from typing import TypeAlias

from comms.wire.bounded_json import one_line

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
Ready: TypeAlias = Callable[[int], None]


class Timer:
    """A scheduled call, which ``cancel`` cancels."""

    __slots__ = ("call", "when_s")

    def __init__(self, when_s: float, call: Callable[[], None]) -> None:
        self.when_s = when_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Cancels the call."""
        self.call = None


class Loop:
    """Runs ready sockets, due timers and posted calls on one thread.

    Only ``post``, ``start``, ``stop`` and ``join`` may be called from other threads. Callbacks of a
    connection are called through a ``Guard``, which contains their exceptions. An exception in any
    other callback ends the loop: it is stored in ``failure`` and passed to ``on_failure``, which
    has to notify all waiting threads.
    """

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self._selector = selectors.DefaultSelector()
        self._receiver, self._waker = socket.socketpair()
        self._receiver.setblocking(False)
        self._waker.setblocking(False)
        self._posted: deque[Callable[[], None]] = deque()
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._awake = False
        self._running = True
        self._on_failure = on_failure
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._selector.register(self._receiver, READ, None)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Makes the thread end after its current callback."""

        def end() -> None:
            self._running = False

        self.post(end)

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the thread to end and returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the I/O thread."""
        return threading.current_thread() is self._thread

    def post(self, call: Callable[[], None]) -> None:
        """Runs ``call`` on the I/O thread soon; never blocks; from any thread.

        A call posted by the I/O thread itself needs no wake-up: the queue is checked before each
        wait.
        """
        self._posted.append(call)
        if not self._awake and threading.get_ident() != self._thread.ident:
            self._awake = True
            # Full means that a wake-up is pending; closed means that the loop has ended.
            with contextlib.suppress(BlockingIOError, OSError):
                self._waker.send(b"\0")

    def soon(self, call: Callable[[], None]) -> None:
        """Runs ``call`` after the other ready sockets; I/O thread only."""
        self._soon.append(call)

    def at(self, when_s: float, call: Callable[[], None]) -> Timer:
        """Runs ``call`` at a time of the monotonic clock; I/O thread only."""
        timer = Timer(when_s, call)
        heapq.heappush(self._timers, (when_s, next(self._order), timer))
        return timer

    def watch(self, sock: socket.socket, events: int, ready: Ready) -> None:
        """Calls ``ready(events)`` whenever the socket is ready; replaces an earlier watch."""
        try:
            self._selector.modify(sock, events, ready)
        except KeyError:
            self._selector.register(sock, events, ready)

    def forget(self, sock: socket.socket) -> None:
        """Stops watching a socket, if it is watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def _run(self) -> None:
        try:
            while self._running:
                self._turn()
        # The only place that catches everything: all threads that wait for this one must be
        # notified.
        except BaseException as error:
            self.failure = error
            self._on_failure(error)
        finally:
            self._selector.close()
            self._receiver.close()
            self._waker.close()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._timeout_s()):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while len(self._receiver.recv(4096)) == 4096:
                        pass
            else:
                key.data(events)
        # Cleared before the queue is read, so that later posts wake the next iteration.
        self._awake = False
        for queue in (self._posted, self._soon):
            for _ in range(len(queue)):
                queue.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                timer.call()

    def _timeout_s(self) -> float | None:
        if self._posted or self._soon:
            return 0.0
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())


class Guard:
    """The loop for one connection: an exception in its callbacks ends only that connection.

    This is the last line of defence. Errors that a peer can cause have their own types and are
    handled where they arise; an exception here is a bug in the channel or in a callback of its
    user. It becomes the error of its connection, with its place and cause.

    Args:
      loop: The I/O thread.
      failed: Called with the exception, on the I/O thread.
    """

    def __init__(self, loop: Loop, failed: Callable[[Exception], None]) -> None:
        self._loop = loop
        self._failed = failed

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the I/O thread."""
        return self._loop.on_thread

    def run(self, call: Callable[..., object], *args: object) -> None:
        """Runs a call immediately; I/O thread only."""
        try:
            call(*args)
        except Exception as error:
            self._failed(error)

    def post(self, call: Callable[[], None]) -> None:
        """As ``Loop.post``."""
        self._loop.post(lambda: self.run(call))

    def soon(self, call: Callable[[], None]) -> None:
        """As ``Loop.soon``."""
        self._loop.soon(lambda: self.run(call))

    def at(self, when_s: float, call: Callable[[], None]) -> Timer:
        """As ``Loop.at``."""
        return self._loop.at(when_s, lambda: self.run(call))

    def watch(self, sock: socket.socket, events: int, ready: Ready) -> None:
        """As ``Loop.watch``."""
        self._loop.watch(sock, events, lambda events: self.run(ready, events))

    def forget(self, sock: socket.socket) -> None:
        """As ``Loop.forget``."""
        self._loop.forget(sock)


def report(error: BaseException) -> None:
    """Reports an exception without a caller, as Python does for threads."""
    threading.excepthook(
        threading.ExceptHookArgs(
            (type(error), error, error.__traceback__, threading.current_thread())
        )
    )


def place_of(error: BaseException) -> str:
    """Returns an exception and the place that raised it, in one line."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = ""
    if place is not None:
        code = place.tb_frame.f_code
        where = f" at {PurePath(code.co_filename).name}:{place.tb_lineno}"
    return f"{type(error).__name__}: {one_line(error, 300)}{where}"
