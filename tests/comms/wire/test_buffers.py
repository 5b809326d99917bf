"""Receive buffers: aligned, and reused only when nothing can see them any more."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from comms import ChannelOptions, Role, Tag
from comms.wire.buffers import ALIGNMENT, BufferPool, allocate_aligned

SIZE = 1 << 20


def lend(pool: BufferPool) -> tuple[np.ndarray, int]:
    """Takes a buffer, releases its lease at once, and returns the array and its address."""
    array, lease = pool.take(SIZE)
    lease.release()
    return array, array.ctypes.data


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 4097, SIZE])
def test_buffers_are_aligned_and_of_the_size_asked_for(nbytes):
    assert allocate_aligned(nbytes).nbytes == nbytes
    array, _ = BufferPool(1 << 30).take(nbytes)
    assert array.nbytes == nbytes and array.dtype == np.uint8
    assert nbytes == 0 or array.ctypes.data % ALIGNMENT == 0


def test_a_dead_and_released_buffer_is_reused():
    pool = BufferPool(4 * SIZE)
    array, address = lend(pool)
    del array
    assert pool.idle_bytes >= SIZE
    array, lease = pool.take(SIZE)
    assert array.ctypes.data == address and pool.reused == 1
    del array
    assert pool.idle_bytes == 0, "not released yet"
    lease.release()
    lease.release()
    assert pool.idle_bytes >= SIZE


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "view_of",
    [
        lambda array: array[10:20],
        lambda array: array.view(np.float32).reshape(-1, 64)[3],
        lambda array: array.view(np.float32).reshape(-1, 64).T,
        lambda array: memoryview(array),
        lambda array: array.data,
        lambda array: np.asarray(array.data)[5:],
        lambda array: np.broadcast_to(array[:3], (3, 3)),
        lambda array: np.lib.stride_tricks.sliding_window_view(array, 4),
    ],
)
def test_any_view_keeps_a_buffer_from_being_reused(view_of):
    pool = BufferPool(4 * SIZE)
    array, address = lend(pool)
    view = view_of(array)
    del array
    gc.collect()
    assert pool.idle_bytes == 0
    other, _ = pool.take(SIZE)
    assert other.ctypes.data != address
    del view
    gc.collect()
    assert pool.idle_bytes >= SIZE


def test_idle_bytes_are_bounded():
    pool = BufferPool(3 * SIZE)
    arrays = [lend(pool)[0] for _ in range(6)]
    arrays.clear()
    gc.collect()
    assert 0 < pool.idle_bytes <= 3 * SIZE
    assert BufferPool(0).take(SIZE)[1] is None


def test_jax_never_sees_a_reused_buffer_change_under_it():
    """Poisoning: whatever jax still reads must not be handed out again and overwritten."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    pool = BufferPool(64 * SIZE)

    @jax.jit
    def slow(array):
        """Reads the argument at the end of a long computation."""
        matrix = jnp.ones((300, 300))
        for _ in range(6):
            matrix = jnp.tanh(matrix @ matrix)
        return array.sum() + 0 * matrix[0, 0], array * 2

    slow(jnp.zeros(SIZE // 4))
    aliased, results = 0, []
    for step in range(60):
        buffer, lease = pool.take(SIZE)
        host = buffer.view(np.float32)
        host[...] = step + 1
        on_device = jax.device_put(host)
        aliased += on_device.unsafe_buffer_pointer() == host.ctypes.data
        total, doubled = slow(on_device)  # returns before it has run
        results.append((step + 1, total, doubled))
        lease.release()
        del buffer, host, on_device, lease
        # Whatever is free now is overwritten at once.
        for _ in range(3):
            poison, poison_lease = pool.take(SIZE)
            poison.view(np.float32)[...] = np.nan
            poison_lease.release()
            del poison
    for value, total, doubled in results:
        assert float(total) == value * (SIZE // 4)
        assert (np.asarray(doubled) == 2 * value).all()
    assert pool.reused > 20, "the test shows nothing if nothing is reused"
    assert aliased > 0, "jax copied every buffer: aligned buffers were meant to be aliased"


def test_received_tensors_reuse_buffers_and_keep_their_values(workshop):
    pair = workshop.pair(ChannelOptions(pool_bytes=16 * SIZE))
    kept = []
    for step in range(60):
        pair.up.send(Tag(role=Role.ACTIVATION, step=step), np.full(SIZE // 4, step, np.int32))
        array = pair.at_server.take_array()
        if step % 5 == 0:
            kept.append((step, array[7:9]))  # a small view must hold the whole buffer
        del array
    for step, view in kept:
        assert (view == step).all()
    assert pair.server.pool.reused > 20


def test_a_released_message_holds_no_buffer(workshop):
    pair = workshop.pair(ChannelOptions(pool_bytes=0), hold=True)
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(SIZE, np.uint8))
    message = pair.at_server.take()
    seen = weakref.ref(message.payload.data)
    message.release()
    gc.collect()
    assert seen() is None
