"""Aligned receive buffers, and a pool that reuses one only when nothing can see it any more.

jax on a CPU does not copy a 64-byte aligned array: its device array *is* the receive buffer, and
dispatch returns before the computation has read it. So a buffer is reused on proof only. What the
channel hands out are views of an ``owner`` array; every view, memoryview and jax array made from
them holds a reference to that owner, and jax drops its own when the last computation that reads
the buffer is done. When the owner dies the memory behind it has no reader left, and only then,
and only if the message was also released, does it go back to the pool.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

from comms.arrays import Bytes

ALIGNMENT = 64
_MIN_POOLED_BYTES = 1 << 14
_SLACK = 4096


def allocate_aligned(nbytes: int) -> Bytes:
    """Returns a fresh, uninitialised array [nbytes] uint8 that begins at a 64-byte boundary."""
    block = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    shift = -block.ctypes.data % ALIGNMENT
    return block[shift : shift + nbytes]


def _size_class(nbytes: int) -> int:
    """Rounds up to a page and an eighth of a power of two, so that near sizes share buffers."""
    step = max(_SLACK, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


class Lease:
    """One pooled buffer in use: it returns when its owner array is dead *and* it was released."""

    __slots__ = ("_block", "_dead", "_pool", "_released")

    def __init__(self, pool: BufferPool, block: Bytes) -> None:
        self._pool = pool
        self._block = block
        self._dead = False
        self._released = False

    def release(self) -> None:
        """Says that the receiver is done with the message."""
        self._settle(released=True)

    def owner_died(self) -> None:
        """Says that no view of the buffer is left; called by the garbage collector."""
        self._settle(dead=True)

    def _settle(self, *, dead: bool = False, released: bool = False) -> None:
        with self._pool.lock:
            before = self._dead and self._released
            self._dead |= dead
            self._released |= released
            if self._dead and self._released and not before:
                self._pool.take_back(self._block)


class BufferPool:
    """Reuses receive buffers up to a bound of idle bytes; 0 switches reuse off. Thread-safe."""

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        # A finalizer may run inside any allocation, hence while this very lock is held.
        self.lock = threading.RLock()
        self._idle: dict[int, list[Bytes]] = {}
        self.idle_bytes = 0
        self.reused = 0

    def take(self, nbytes: int) -> tuple[Bytes, Lease | None]:
        """Returns an aligned array [nbytes] uint8, and the lease if it came from the pool."""
        if self._max_idle_bytes == 0 or nbytes < _MIN_POOLED_BYTES:
            return allocate_aligned(nbytes), None
        size = _size_class(nbytes)
        with self.lock:
            idle = self._idle.get(size)
            block = idle.pop() if idle else None
            if block is not None:
                self.idle_bytes -= size
                self.reused += 1
        if block is None:
            block = allocate_aligned(size)
        lease = Lease(self, block)
        # Made from a memoryview, the owner's base is no ndarray: numpy stops collapsing chains of
        # bases here, so every later view refers to ``owner`` and keeps it alive.
        owner = np.frombuffer(block.data, dtype=np.uint8, count=nbytes)
        weakref.finalize(owner, lease.owner_died).atexit = False
        return owner, lease

    def take_back(self, block: Bytes) -> None:
        """Keeps a block for reuse, or lets it go when enough are idle."""
        with self.lock:
            if self.idle_bytes + block.nbytes > self._max_idle_bytes:
                return
            self._idle.setdefault(block.nbytes, []).append(block)
            self.idle_bytes += block.nbytes
