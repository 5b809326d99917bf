"""Functions that the user gives, ``MODULE:FUNCTION``: found, called, and their errors told well.

What such a function raises is told in one line: whose it is, the error with its own message, and
the user's line that raised it. The error keeps the user's as its cause, and ``of_user`` is set, so
that a process leaves the traceback in its log.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipar_jax.errors import PiparError
from stages.foreign import describe


def find(path: str, what: str, kind: type[PiparError]) -> Callable[..., Any]:
    """Returns a user's function; a call of it raises errors as ``guarded`` makes them.

    Args:
      path: ``MODULE:FUNCTION``.
      what: What it is, to begin messages with: ``own data module:mine:load``.
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
                f"{what} cannot be imported: {cause}: it must be in the folder in which the "
                "command runs, or installed"
            ) from cause
        raise
    made = getattr(module, function, None)
    if not callable(made):
        raise kind(
            f"{what} cannot be imported: module {name!r} ({getattr(module, '__file__', None)}) has "
            f"no function {function!r}"
        )

    def call(*arguments: Any) -> Any:
        with guarded(f"{what} failed", kind):
            return made(*arguments)

    return call


@contextmanager
def guarded(what: str, kind: type[PiparError]) -> Iterator[None]:
    """Turns whatever a user's code raises inside into one error that names it and its line.

    Args:
      what: What failed, to begin the message with: ``own data module:mine:load failed``.
      kind: The error to raise.

    Raises:
      PiparError: The user's code failed; an attempt to end the process counts too.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        made = kind(f"{what}: {describe(error)}")
        made.of_user = True
        raise made from error


def _parents(name: str) -> set[str]:
    """Returns the names of a module and of the packages that it is in."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
