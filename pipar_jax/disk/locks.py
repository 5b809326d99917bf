"""Locks between processes of this machine, or of one that shares the folder.

The system releases a lock when its process ends, however that happens. On file systems without
locks, and on systems other than POSIX, nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipar_jax.errors import RunError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_POLL_S = 0.1
#: Errors of file systems that have no locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for a lock and holds it in the block.

    Args:
      path: The lock file; its folder is created if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def held(path: Path, wait_s: float) -> Iterator[int]:
    """Holds a lock in the block, or refuses if another process does.

    The file has the number of the process that holds it. A process that inherits the descriptor
    holds the lock as well, until both have ended or the block is left.

    Args:
      path: The lock file.
      wait_s: Seconds to wait for another process, which may be ending.

    Yields:
      The descriptor of the lock.

    Raises:
      OSError: The file cannot be written.
      RunError: Another process holds the lock.
    """
    until_s = time.monotonic() + wait_s
    with open(path, "a+", encoding="utf-8") as file:
        while not _try_lock(file):
            if time.monotonic() > until_s:
                file.seek(0)
                holder = file.read(20).strip() or "unknown"
                raise RunError(
                    f"{path.parent} is in use by another run (process {holder}): wait for its "
                    "end, end it, or give this run another name"
                )
            time.sleep(_POLL_S)
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield file.fileno()
        finally:
            if fcntl is not None:  # also for processes that inherited it
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)


def _try_lock(file: IO[str]) -> bool:
    """Locks a file; returns whether no other process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True
