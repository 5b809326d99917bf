"""Keeping freed memory in the process.

XLA on CPUs takes the temporary memory of every call from the C library and gives it back
afterwards. glibc returns large blocks to the kernel at once, so each call faults in (and the
kernel clears) every page again: a training step that needs 100 MB spends longer there than in
its arithmetic. Keeping freed blocks avoids it, for a process that stays at its peak size.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def retain_memory() -> bool:
    """Tells glibc to keep freed memory; call it before jax is imported or threads start.

    A thread that ran before has an arena of its own, which later threads are given in turns with
    the first. There, blocks of more than 64 MB go back to the kernel whatever was said here.

    Returns:
      Whether the C library understood; elsewhere than on glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Never trim, no block of its own for large requests, and one arena: a block that one
    # thread freed is then there for the next thread that asks.
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    return all([library.mallopt(name, value) == 1 for name, value in settings])
