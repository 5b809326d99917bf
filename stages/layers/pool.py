"""Pooling."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from stages.layers.formulation import Formulation, LayerShape, choose
from stages.trees import PyTree

Edges: TypeAlias = tuple[tuple[int, int], tuple[int, int]]


def max_pool(
    x: jax.Array, window: int, *, stride: int | None = None, padding: int = 0
) -> jax.Array:
    """Takes maxima over square windows of [batch, height, width, channels].

    If several elements of a window are equal to the maximum, the first of them, in row-major order,
    gets the whole cotangent, in every formulation.
    """
    return pool_maxima(x, window, stride or window, ((padding, padding), (padding, padding)))


def pool_maxima(x: jax.Array, window: int, step: int, edges: Edges) -> jax.Array:
    """Takes maxima over square windows, with any padding by minus infinity.

    Args:
      x: [batch, height, width, channels], floating.
      window: Height and width of the window.
      step: Its step in both directions.
      edges: Rows added before and after; columns added before and after.
    """
    batch, height, width, channels = x.shape
    key = LayerShape(batch, height, width, channels, channels, window, step, edges[0][0])
    if choose("max_pool", key) is Formulation.XLA:
        return _window_max(x, window, step, edges)
    padded = any(map(any, edges))
    if step == window and not padded:
        rows, columns = x.shape[1] // window, x.shape[2] // window
        return _tile_max(x[:, : rows * window, : columns * window], window)
    if padded:
        x = jnp.pad(x, ((0, 0), *edges, (0, 0)), constant_values=-jnp.inf)
    return _slice_max(x, window, step)


def average_pool(x: jax.Array, window: int) -> jax.Array:
    """Averages non-overlapping square windows of [batch, height, width, channels].

    Rows and columns that fill no window are left out.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    kept = x[:, : rows * window, : columns * window]
    return kept.reshape(batch, rows, window, columns, window, channels).mean((2, 4))


def global_average_pool(x: jax.Array) -> jax.Array:
    """Averages [batch, height, width, channels] over height and width."""
    return x.mean((1, 2))


def _window_max(x: jax.Array, window: int, step: int, edges: Edges) -> jax.Array:
    """XLA's own; its backward pass (select and scatter) is a scalar loop on CPUs."""
    pads = ((0, 0), *edges, (0, 0))
    pooled: jax.Array = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, step, step, 1), pads
    )
    return pooled


def _first_largest(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Elementwise maximum of equal shapes and the index of the first that attains it."""
    best, index = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
    for place, part in enumerate(parts[1:], start=1):
        index = jnp.where(part > best, jnp.uint8(place), index)
        best = jnp.maximum(best, part)
    return best, index


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tile_max(x: jax.Array, window: int) -> jax.Array:
    """Windows that tile the image: maxima of strided slices, with a byte per window kept."""
    return _tile_forward(x, window)[0]


def _tile_forward(x: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height // window, window, width // window, window, channels)
    return _first_largest([tiles[:, :, i, :, j] for i in range(window) for j in range(window)])


def _tile_backward(window: int, index: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    batch, rows, columns, channels = cotangent.shape
    line = jnp.arange(window, dtype=jnp.uint8)
    place = (window * line[:, None] + line).reshape(1, 1, window, 1, window, 1)
    # One elementwise pass over the image: broadcast, compare, select.
    chosen = index[:, :, None, :, None] == place
    spread = jnp.where(chosen, cotangent[:, :, None, :, None], 0)
    return (spread.reshape(batch, rows * window, columns * window, channels),)


_tile_max.defvjp(_tile_forward, _tile_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _slice_max(x: jax.Array, window: int, step: int) -> jax.Array:
    """Windows that overlap: maxima of strided slices, cotangents added back slice by slice."""
    return _slice_forward(x, window, step)[0]


def _slice_forward(x: jax.Array, window: int, step: int) -> tuple[jax.Array, PyTree]:
    pooled, index = _first_largest([x[place] for place in _places(x.shape, window, step)])
    return pooled, (index, x.shape[1:3])


def _slice_backward(window: int, step: int, kept: PyTree, cotangent: jax.Array) -> tuple[jax.Array]:
    index, (height, width) = kept
    rows, columns = ((size - 1) * step + 1 for size in cotangent.shape[1:3])
    zero = jnp.zeros((), cotangent.dtype)
    total = jnp.zeros((), cotangent.dtype)
    for number in range(window * window):
        i, j = divmod(number, window)
        part = jnp.where(index == number, cotangent, zero)
        edges = (
            (0, 0, 0),
            (i, height - i - rows, step - 1),
            (j, width - j - columns, step - 1),
            (0, 0, 0),
        )
        total = total + lax.pad(part, zero, edges)
    return (total,)


_slice_max.defvjp(_slice_forward, _slice_backward)


def _places(shape: tuple[int, ...], window: int, step: int) -> list[tuple[slice, ...]]:
    """Strided slices of an image, one for each position in the window."""
    rows = (shape[1] - window) // step * step + 1
    columns = (shape[2] - window) // step * step + 1
    return [
        (slice(None), slice(i, i + rows, step), slice(j, j + columns, step))
        for i in range(window)
        for j in range(window)
    ]
