"""Batch and group normalisation layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from stages import context
from stages.layers.dtypes import weight_dtype
from stages.layers.norm_functions import EPSILON, batch_normalise, group_normalise

MOMENTUM = 0.9


class BatchNorm(nnx.Module):
    """Batch normalisation over ghost batches.

    In training the statistics are those of the micro-batch (a ghost batch), so they depend on
    the number of micro-batches. The running averages decay by
    MOMENTUM ** (samples / samples of the mini-batch), so after a mini-batch they have decayed
    equally however many micro-batches it had. The running variance is the biased one.
    """

    def __init__(self, features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        """Starts with scale 1, bias 0, running mean 0 and running variance 1.

        Args:
          features: Size of the last axis.
          dtype: Dtype of the output; statistics are computed in at least float32.
          rngs: Unused; all normalisations have the same arguments.
        """
        del rngs
        held = weight_dtype(dtype)
        self.scale = nnx.Param(jnp.ones((features,), held))
        self.bias = nnx.Param(jnp.zeros((features,), held))
        self.mean = nnx.BatchStat(jnp.zeros((features,), held))
        self.var = nnx.BatchStat(jnp.ones((features,), held))
        self.dtype = dtype

    def __call__(self, x: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        """Normalises the last axis of x + offset.

        Args:
          x: [batch, …, features].
          offset: [features], the bias of the layer before. In training the batch mean takes
            it out again, so it is never added and its gradient is zero, exactly.
        """
        scope = context.current()
        scale, bias = self.scale[...], self.bias[...]
        shift = jnp.zeros_like(bias) if offset is None else offset.astype(bias.dtype)
        x = x.astype(self.dtype)
        if not scope.train:
            gain = scale * lax.rsqrt(self.var[...] + EPSILON)
            y = x.astype(scale.dtype) * gain + (bias + (shift - self.mean[...]) * gain)
            return y.astype(self.dtype)
        y, mean, var = batch_normalise(x, scale, bias)
        decay = jnp.asarray(MOMENTUM, scale.dtype) ** jnp.asarray(scope.share, scale.dtype)
        mean, var = lax.stop_gradient((mean + shift, var))
        mean = decay * self.mean[...] + (1 - decay) * mean
        var = decay * self.var[...] + (1 - decay) * var
        # Assigning through an index would search the whole trace for each array's sharding.
        self.mean.set_value(mean)
        self.var.set_value(var)
        return y


class GroupNorm(nnx.Module):
    """Group normalisation, which is independent of micro-batches."""

    def __init__(self, features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        """Starts with scale 1 and bias 0.

        Args:
          features: Size of the last axis; the number of groups is ``group_count(features)``.
          dtype: Dtype of the output; statistics are computed in at least float32.
          rngs: Unused; all normalisations have the same arguments.
        """
        del rngs
        held = weight_dtype(dtype)
        self.scale = nnx.Param(jnp.ones((features,), held))
        self.bias = nnx.Param(jnp.zeros((features,), held))
        self.groups = group_count(features)
        self.dtype = dtype

    def __call__(self, x: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        """Normalises each group of channels of each sample of x + offset.

        Args:
          x: [batch, …, features].
          offset: [features], the bias of the layer before.
        """
        scale, bias = self.scale[...], self.bias[...]
        x = x.astype(self.dtype)
        if offset is not None:
            x = x + offset.astype(self.dtype)
        channels = scale.shape[0] // self.groups
        group = jnp.kron(jnp.eye(self.groups), jnp.ones((channels, channels)) / channels)
        return group_normalise(x, scale, bias, group.astype(scale.dtype))


def group_count(features: int) -> int:
    """Number of groups: the largest, up to 32, that leaves at least 8 channels in each."""
    legal = [n for n in range(1, 33) if features % n == 0 and features // n >= 8]
    return max(legal, default=1)


def make_norm(
    kind: str, features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> BatchNorm | GroupNorm:
    """Makes the normalisation named ``kind``, "batch" or "group"."""
    chosen = BatchNorm if kind == "batch" else GroupNorm
    return chosen(features, dtype=dtype, rngs=rngs)
