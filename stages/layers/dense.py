"""Dense layers over the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stages.layers.dtypes import weight_dtype
from stages.layers.initializers import normal


class Dense(nnx.Module):
    """Affine map of the last axis, normal kernel of variance gain / fan in, zero bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gain: float = 1.0,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the kernel.

        Args:
          in_features: Size of the last axis of the input.
          out_features: Size of the last axis of the output.
          gain: 2 before a ReLU (He), 1 before a softmax (LeCun).
          use_bias: Whether to add a bias.
          dtype: Dtype to compute in.
          rngs: Random streams.
        """
        held = weight_dtype(dtype)
        deviation = (gain / in_features) ** 0.5
        shape = (in_features, out_features)
        self.kernel = nnx.Param(normal(rngs, shape, deviation, held))
        self.bias = nnx.Param(jnp.zeros((out_features,), held)) if use_bias else None
        self.dtype = dtype
        self.lora: nnx.Module | None = None  # see ``stages.layers.lora``

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, …, in] to [batch, …, out]."""
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.lora is not None:
            y += self.lora(x)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Flatten(nnx.Module):
    """Joins all axes but the first."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reshapes [batch, …] to [batch, features]."""
        return x.reshape(x.shape[0], -1)
