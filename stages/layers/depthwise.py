"""Depthwise convolution: one kernel per channel.

XLA's grouped convolution is a scalar loop on CPUs, twenty times slower than memory. As sums of
shifted images times a weight per channel, each pass is a few fused elementwise loops.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stages.layers.conv_functions import Geometry, pad_images, shifted, xla_convolve
from stages.layers.formulation import Formulation, LayerShape, choose
from stages.trees import PyTree

# Rows summed inside one elementwise loop by the kernel's gradient: enough that what is written
# is small compared with what is read, few enough that the loop's code stays short.
ROWS = 8


def depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves each channel with its own kernel.

    Args:
      x: [batch, height, width, channels].
      kernel: [size, size, 1, channels], dtype of x.
      geometry: Stride and padding.

    Returns:
      [batch, height', width', channels], dtype of x.
    """
    batch, height, width, channels = x.shape
    key = LayerShape(batch, height, width, channels, channels, *geometry[:3])
    if choose("depthwise", key) is Formulation.DIRECT:
        return _direct(x, kernel, geometry)
    return xla_convolve(x, kernel, geometry, groups=x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _direct(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Sum over the kernel's positions of shifted images times weights."""
    rows, columns = geometry.out(x.shape[1]), geometry.out(x.shape[2])
    return _multiply_add(pad_images(x, geometry, 1), kernel, geometry, rows, columns)


def _direct_forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> Any:
    return _direct(x, kernel, geometry), (x, kernel)


def _direct_backward(geometry: Geometry, kept: PyTree, cotangent: jax.Array) -> Any:
    x, kernel = kept
    gradient = _kernel_gradient(x, geometry, cotangent)
    spread = geometry.spread(cotangent, x.shape)
    turned = kernel[::-1, ::-1]
    plain = Geometry(geometry.size, 1, 0)
    x_cotangent = _multiply_add(spread, turned, plain, x.shape[1], x.shape[2])
    return x_cotangent, gradient


_direct.defvjp(_direct_forward, _direct_backward)


def _multiply_add(
    padded: jax.Array, kernel: jax.Array, geometry: Geometry, rows: int, columns: int
) -> jax.Array:
    """One fused loop over the output; the padded input is made beforehand, not inside it."""
    held = lax.optimization_barrier(padded)  # type: ignore[no-untyped-call]
    images = shifted(held, geometry, 1, rows, columns)
    weights = kernel.reshape(-1, kernel.shape[-1])
    total: jax.Array = images[0] * weights[0]
    for image, weight in zip(images[1:], weights[1:], strict=True):
        total = total + image * weight
    return total


def _kernel_gradient(x: jax.Array, geometry: Geometry, cotangent: jax.Array) -> jax.Array:
    """Sums of products of shifted images and the cotangent, a few rows at a time."""
    batch, rows, columns, channels = cotangent.shape
    padded = pad_images(x, geometry, 1)
    padded = lax.optimization_barrier(padded)  # type: ignore[no-untyped-call]
    together = max(n for n in range(1, ROWS + 1) if rows % n == 0)
    tall = (batch, rows // together, together, columns, channels)
    grouped = cotangent.reshape(tall)
    sums = []
    for image in shifted(padded, geometry, 1, rows, columns):
        parts = image.reshape(tall)
        product = parts[:, :, 0] * grouped[:, :, 0]
        for row in range(1, together):
            product = product + parts[:, :, row] * grouped[:, :, row]
        # Fused into the sum the products would be a scalar loop.
        held = lax.optimization_barrier(product)  # type: ignore[no-untyped-call]
        sums.append(held.sum((0, 1, 2)))
    return jnp.stack(sums).reshape(geometry.size, geometry.size, 1, channels)
