"""Functions of the user, ``MODULE:FUNCTION``: finds and calls them and reports their errors.

An exception in such a function is reported in one line: the function, the exception with its
message, and the line of the user's code that raised it. The exception is the cause of the error,
and ``of_user`` is set, so that a process writes the traceback to its log.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipar_jax.errors import PiparError
from stages.foreign import describe


def find(path: str, what: str, kind: type[PiparError]) -> Callable[..., Any]:
    """Returns a user's function, wrapped so that it raises errors as ``guarded`` does.

    Args:
      path: ``MODULE:FUNCTION``.
      what: Begins the messages, such as ``own data module:mine:load``.
      kind: The error to raise.

    Raises:
      PiparError: The module cannot be found, fails while it is imported, or has no such function.
    """
    name, _, function = path.partition(":")
    try:
        with guarded(f"{what} cannot be imported", kind):
            module = importlib.import_module(name)
    except PiparError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in _parents(name):
            raise kind(
                f"{what} cannot be imported: {cause}: it must be in the working directory of the "
                "command, or installed"
            ) from cause
        raise
    made = getattr(module, function, None)
    if not callable(made):
        raise kind(
            f"{what} cannot be imported: module {name!r} ({getattr(module, '__file__', None)}) has "
            f"no function {function!r}"
        )

    @functools.wraps(made)
    def call(*arguments: Any, **named: Any) -> Any:
        with guarded(f"{what} failed", kind):
            return made(*arguments, **named)

    return call


@contextmanager
def guarded(what: str, kind: type[PiparError]) -> Iterator[None]:
    """Turns any exception of a user's code into an error that names the code and its line.

    Args:
      what: Begins the message, such as ``own data module:mine:load failed``.
      kind: The error to raise.

    Raises:
      PiparError: The user's code raised an exception, or tried to end the process.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        made = kind(f"{what}: {describe(error)}")
        made.of_user = True
        raise made from error


def _parents(name: str) -> set[str]:
    """Returns the names of a module and of its parent packages."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
