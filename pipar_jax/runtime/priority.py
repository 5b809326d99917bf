"""The priority of threads that work beside training."""

from __future__ import annotations

import contextlib
import os
import threading

#: Added to the thread's niceness where the system has one per thread: training goes first.
NICENESS = 10


def lower_priority() -> None:
    """Lowers the calling thread's priority, where the system supports it per thread."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):  # an optimisation, not a requirement
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
