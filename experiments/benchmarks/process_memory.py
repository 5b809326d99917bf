"""Memory of a process's descendants, as sampled from Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

INTERVAL_S = 0.1


class Peak:
    """The most that the processes held together at any sample.

    Attributes:
      nbytes: Sum of their resident memory; pages that several share count for each.
    """

    nbytes = 0


@contextlib.contextmanager
def sampled(root: int) -> Iterator[Peak]:
    """Samples the descendants of a process, without itself, inside a with statement.

    Args:
      root: Its id.
    """
    peak, stop = Peak(), threading.Event()

    def run() -> None:
        while not stop.wait(INTERVAL_S):
            peak.nbytes = max(peak.nbytes, descendants_bytes(root))

    thread = threading.Thread(target=run, name="process-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def descendants_bytes(root: int) -> int:
    """Returns the resident memory of all descendants of a process."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            status = (folder / "stat").read_text().rpartition(") ")[2].split()
            parents[int(folder.name)] = int(status[1])
            resident[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * page
    return sum(nbytes for process, nbytes in resident.items() if _descends(process, root, parents))


def _descends(process: int, root: int, parents: dict[int, int]) -> bool:
    while (process := parents.get(process, 0)) > 1:
        if process == root:
            return True
    return False
