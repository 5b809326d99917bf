"""A program that several processes of a machine need at once is compiled by one of them."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: each process compiles for itself
    fcntl = None  # type: ignore[assignment]

#: Seconds after which a process compiles a program itself, although another one is compiling it.
PATIENCE_S = 120.0
_POLL_S = 0.02
#: What a compilation must be called with for another process's result to take its place.
_NEEDED = ("module_name", "cache_key", "compile_options", "backend", "executable_devices")


def once(
    compile_and_write: Callable[..., Any],
    folder: Callable[[Any], Path | None],
    read: Callable[..., tuple[Any, Any]],
) -> Callable[..., Any] | None:
    """Returns a compilation that waits for another process's of the same program.

    Devices of one machine come to their equal stages at the same time, and none would find in the
    cache what the others are about to write.

    Args:
      compile_and_write: Jax's compilation of a program that is not in the cache.
      folder: The folder of a backend's cache; None if it has none that processes share.
      read: Jax's look into the cache: (name, key, options, backend, devices) -> (program or None,
        the seconds that compiling it took).

    Returns:
      None if this version of jax compiles with other arguments, or the platform has no locks.
    """
    signature = inspect.signature(compile_and_write)
    if fcntl is None or any(name not in signature.parameters for name in _NEEDED):
        return None

    def compile_once(*positional: Any, **named: Any) -> Any:
        given = signature.bind(*positional, **named).arguments
        path = folder(given["backend"])
        if path is None:
            return compile_and_write(*positional, **named)
        with claimed(path / f".{given['cache_key']}.lock"):
            program, _ = read(*(given[name] for name in _NEEDED))
            return compile_and_write(*positional, **named) if program is None else program

    return compile_once


@contextlib.contextmanager
def claimed(path: Path, patience_s: float = PATIENCE_S) -> Iterator[bool]:
    """Holds a lock file inside a with statement; the kernel frees that of a process that ends.

    Args:
      path: The file, which is removed in the end.
      patience_s: Seconds to wait for whoever holds it. After that, and where a file cannot be
        locked, the statement goes on without the lock.

    Yields:
      Whether it holds the lock.
    """
    held = _wait_for(path, time.monotonic() + patience_s)
    try:
        yield held is not None
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)  # before it is unlocked: nobody else's is removed
            os.close(held)


def _wait_for(path: Path, end_s: float) -> int | None:
    """Returns the locked file, or None if it cannot be locked or not before a moment."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # a folder that this user may only read, a full disk
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
            os.close(file)
        except BlockingIOError:
            os.close(file)
            if time.monotonic() >= end_s:
                return None
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            os.close(file)
            return None


def _is_at(path: Path, file: int) -> bool:
    """Returns whether an open file is still the one at a path: its last holder removes it."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))
