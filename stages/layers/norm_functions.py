"""Normalisation with backward passes written out.

The automatically derived backward pass of batch normalisation makes several unnecessary passes over
the activations. Written out it is two sums and one elementwise pass, which XLA fuses well on every
platform, so that this formulation is used everywhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stages.trees import PyTree

EPSILON = 1e-5


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises over all axes but the last (Ioffe and Szegedy 2015, algorithm 1).

    Args:
      x: [batch, …, features].
      scale: [features], in the dtype that statistics are computed in.
      bias: [features].
      epsilon: Added to the variance.

    Returns:
      The output, shape and dtype of x; the mean [features]; the biased variance [features].
      The statistics carry no gradient of their own.
    """
    y, mean, var = _batch_forward(x, scale, bias, epsilon)[0]
    return y, mean, var


def _batch_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> Any:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(scale.dtype)
    mean = jnp.mean(wide, axes)
    # Two passes: the mean of squares minus the squared mean cancels badly in float32.
    var = jnp.mean(jnp.square(wide - mean), axes)
    inverse = lax.rsqrt(var + epsilon)
    y = ((wide - mean) * (scale * inverse) + bias).astype(x.dtype)
    return (y, mean, var), (x, scale, mean, inverse)


def _batch_backward(
    epsilon: float, kept: PyTree, cotangents: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del epsilon  # the inverse deviation contains it
    x, scale, mean, inverse = kept
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    cotangent = cotangents[0].astype(scale.dtype)
    centred = x.astype(scale.dtype) - mean
    bias_gradient = jnp.sum(cotangent, axes)
    projection = jnp.sum(cotangent * centred, axes) * inverse
    x_cotangent = (scale * inverse) * (
        cotangent - bias_gradient / count - centred * (projection * inverse / count)
    )
    return x_cotangent.astype(x.dtype), projection, bias_gradient


batch_normalise.defvjp(_batch_forward, _batch_backward)


@jax.custom_vjp
def group_normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, group: jax.Array) -> jax.Array:
    """Normalises groups of channels of each sample (Wu and He 2018, equations 1 to 4).

    Sums are taken per sample and channel first, which is one pass over contiguous memory, and
    only then over the channels of a group.

    Args:
      x: [batch, …, features].
      scale: [features], in the dtype that statistics are computed in.
      bias: [features].
      group: [features, features], 1 / channels of a group where two channels share one, else 0.

    Returns:
      The output, shape and dtype of x.
    """
    y: jax.Array = _group_forward(x, scale, bias, group)[0]
    return y


def _group_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, group: jax.Array) -> Any:
    mean = _group_mean(x.astype(scale.dtype), group)
    centred = x.astype(scale.dtype) - _spread(mean, x)
    inverse = lax.rsqrt(_group_mean(jnp.square(centred), group) + EPSILON)
    y = (centred * _spread(inverse * scale, x) + bias).astype(x.dtype)
    return y, (x, scale, group, mean, inverse)


def _group_backward(kept: PyTree, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, scale, group, mean, inverse = kept
    axes, count = tuple(range(1, x.ndim - 1)), x[0].size // x.shape[-1]
    cotangent = cotangent.astype(scale.dtype)
    centred = x.astype(scale.dtype) - _spread(mean, x)
    sums = jnp.sum(cotangent, axes)
    projections = jnp.sum(cotangent * centred, axes) * inverse
    exact = lax.Precision.HIGHEST
    shift = jnp.matmul(sums * scale, group, precision=exact) / count
    slope = jnp.matmul(projections * scale, group, precision=exact) / count
    x_cotangent = (
        cotangent * _spread(scale * inverse, x)
        - _spread(shift * inverse, x)
        - centred * _spread(slope * jnp.square(inverse), x)
    )
    return x_cotangent.astype(x.dtype), projections.sum(0), sums.sum(0), jnp.zeros_like(group)


group_normalise.defvjp(_group_forward, _group_backward)


def _group_mean(x: jax.Array, group: jax.Array) -> jax.Array:
    """Means over the positions and the channels of a group, [batch, features]."""
    per_channel = jnp.mean(x, tuple(range(1, x.ndim - 1)))
    return jnp.matmul(per_channel, group, precision=lax.Precision.HIGHEST)


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [batch, features] so that it broadcasts against x."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 2), values.shape[-1])
