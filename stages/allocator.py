"""Keeping freed memory in the process, and the most that it has held.

XLA on CPUs takes the temporary memory of every call from the C library and gives it back
afterwards. glibc returns large blocks to the kernel at once, so each call faults in (and the
kernel clears) every page again: a training step that needs 100 MB spends longer there than in
its arithmetic. Keeping freed blocks avoids it, for a process that stays at its peak size.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def return_memory() -> None:
    """Gives the kernel the freed memory that the process keeps; call it after compiling.

    A compiler's heap is several times what training needs, and nothing uses it again.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def retain_memory() -> bool:
    """Tells glibc to keep freed memory; call it before jax is imported or threads start.

    A thread that already runs has its own arena, which later threads may share. In that arena
    blocks of more than 64 MB are returned to the kernel regardless of this setting.

    Returns:
      Whether the C library supports the setting; only glibc does.
    """
    library = _glibc()
    if library is None:
        return False
    # Never trim, no separate mapping for large requests, and one arena, so that a block freed by
    # one thread is available to all.
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    return all([library.mallopt(name, value) == 1 for name, value in settings])


def peak_bytes() -> int:
    """Returns the most memory that this process has held. Loads no library that would add to it."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux includes the parent process.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library of this process if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
