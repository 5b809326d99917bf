"""Aligned receive buffers, and a pool that reuses a buffer only when nothing refers to it.

jax on a CPU does not copy a 64-byte aligned array: its device array *is* the receive buffer, and
dispatch returns before the computation has read it. The channel delivers views of an ``owner``
array; every view, memoryview and jax array made from them refers to that owner, and jax drops its
reference when the last computation that reads the buffer has finished. The memory returns to the
pool only when the owner has been collected, so that it has no readers left, and the message was
released.
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
    """Returns a new, uninitialised array [nbytes] uint8 that is aligned to 64 bytes."""
    block = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    shift = -block.ctypes.data % ALIGNMENT
    return block[shift : shift + nbytes]


def _size_class(nbytes: int) -> int:
    """Rounds up to pages and eighths of a power of two, so that similar sizes share buffers."""
    step = max(_SLACK, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


class Lease:
    """A pooled buffer in use; it returns when its owner array is dead *and* it was released."""

    __slots__ = ("_block", "_dead", "_pool", "_released")

    def __init__(self, pool: BufferPool, block: Bytes) -> None:
        self._pool = pool
        self._block = block
        self._dead = False
        self._released = False

    def release(self) -> None:
        """Reports that the receiver has released the message."""
        self._settle(released=True)

    def owner_died(self) -> None:
        """Reports that no view of the buffer is left; called by the garbage collector."""
        self._settle(dead=True)

    def _settle(self, *, dead: bool = False, released: bool = False) -> None:
        with self._pool.lock:
            before = self._dead and self._released
            self._dead |= dead
            self._released |= released
            if self._dead and self._released and not before:
                self._pool.take_back(self._block)


class BufferPool:
    """Reuses receive buffers up to a limit of idle bytes; 0 disables reuse. Thread-safe."""

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        # A finalizer may run inside any allocation, and thus while this lock is held.
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
        # Made from a memoryview, the owner's base is not an ndarray: numpy stops collapsing chains
        # of bases here, so every later view refers to ``owner`` and keeps it alive.
        owner = np.frombuffer(block.data, dtype=np.uint8, count=nbytes)
        weakref.finalize(owner, lease.owner_died).atexit = False
        return owner, lease

    def take_back(self, block: Bytes) -> None:
        """Keeps a block for reuse, or frees it if enough are idle."""
        with self.lock:
            if self.idle_bytes + block.nbytes > self._max_idle_bytes:
                return
            self._idle.setdefault(block.nbytes, []).append(block)
            self.idle_bytes += block.nbytes
