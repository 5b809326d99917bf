"""Runs work on chosen cores: in this thread for a while, or in a separate process.

Measurements depend on the cores that the work runs on, and jax reads its environment when it is
first imported. A measurement therefore runs in a new process, which is pinned and has its
environment set before it imports anything.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pipar_jax import errors
from pipar_jax.errors import RunError

P = ParamSpec("P")
R = TypeVar("R")

# Seconds that a process may take to end before it is killed.
END_S = 5.0


@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Runs the block, and the threads and processes that it starts, on ``cores`` only.

    If the system cannot pin (macOS) or ``cores`` is empty, the block runs on any core.

    Raises:
      RunError: This process may not use one of the cores.
    """
    wanted = set(cores)
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if not wanted <= before:
        raise RunError(
            f"cannot pin to cores {sorted(wanted)}: this process may use {sorted(before)}; "
            "choose among those"
        )
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the block and restores their previous values after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_cores(count: int) -> list[int]:
    """Returns up to ``count`` of the cores that this process may use.

    If the system cannot report them, the list is empty, with which ``pinned`` does not pin.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[:count]


class _Failure(NamedTuple):
    """An exception of a function, as texts: not every exception survives a pipe.

    Attributes:
      kind: The name of its type.
      text: Its message.
      trace: Its traceback.
    """

    kind: str
    text: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """Returns an exception that is being handled."""
        return cls(type(error).__name__, str(error), traceback.format_exc())

    def error(self, said: str) -> Exception:
        """Returns what to raise in the process that called the function.

        Args:
          said: What begins the message where the exception is not one of the project's.
        """
        import comms.errors  # here, since the process that measures needs neither
        import stages.errors

        homes = (errors, stages.errors, comms.errors)
        kind = next((getattr(home, self.kind) for home in homes if hasattr(home, self.kind)), None)
        first_line = (self.text.strip().splitlines() or ["no message"])[0]
        unknown = RunError(f"{said}: {self.kind}: {first_line}")
        made: Exception = unknown if kind is None else kind(self.text)
        made.add_note(self.trace)
        return made


class PinnedProcess:
    """A new process on chosen cores that calls functions, one after another, until closed.

    It is spawned, not forked, so that it shares no state with this process; compiled programs are
    kept between calls, so that two processes can take turns. Functions must be importable by name;
    arguments and results must be plain values.

    Example:
        with PinnedProcess("device", cores=[0]) as device:
            seconds = device.call(time_step, batch=100)
    """

    def __init__(
        self, name: str, *, cores: Iterable[int] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        # A package in the working directory must not shadow one of ours.
        variables = {"PYTHONSAFEPATH": "1", **(variables or {})}
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name=name, daemon=True)
        with pinned(cores), environment(variables):
            self._process.start()
        theirs.close()

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls ``function`` in the process and returns its result.

        Raises:
          PiparError: The function raised it. Whatever is raised has the traceback as a note.
          StageError: Likewise.
          ChannelError: Likewise.
          RunError: The function raised another exception, or the process ended.
        """
        try:
            self._pipe.send((function, args, kwargs))
            result, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(END_S)
            raise RunError(
                f"process {self.name} ended (exit code {self._process.exitcode}) while it ran "
                f"{_name(function)}; see its last lines above"
            ) from error
        if failure is not None:
            raise failure.error(f"{_name(function)} failed in process {self.name}")
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process, by force if it is still busy after a few seconds. Idempotent."""
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def __enter__(self) -> PinnedProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._process.is_alive():
            self._process.kill()  # nothing waits for a result any more
        self.close()


def run_pinned(
    function: Callable[..., R],
    *args: Any,
    cores: Iterable[int] = (),
    variables: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> R:
    """Calls ``function`` in a new process on ``cores`` and returns its result.

    Raises:
      PiparError: As ``PinnedProcess.call``.
    """
    with PinnedProcess(_name(function), cores=cores, variables=variables) as process:
        return process.call(function, *args, **kwargs)


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _serve(pipe: Connection) -> None:
    """Serves calls until the other end of the pipe is closed or its process has ended."""
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        result, failure = None, None
        try:
            result = function(*args, **kwargs)
        except KeyboardInterrupt:
            return
        except Exception as error:  # passed to the caller, where call() raises it
            failure = _Failure.of(error)
        pipe.send((result, failure))
