"""Two-dimensional convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stages.layers.conv_functions import Geometry, convolve, xla_convolve
from stages.layers.depthwise import depthwise
from stages.layers.dtypes import weight_dtype
from stages.layers.initializers import normal


class Conv(nnx.Module):
    """Convolution with 'same'-like padding, He-normal kernel (fan out) and zero bias.

    The kernel is [height, width, in / groups, out] in the weights' dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the kernel.

        Args:
          in_features: Channels of the input.
          out_features: Channels of the output.
          size: Height and width of the kernel.
          stride: Step of the kernel in both directions.
          groups: Number of groups that the channels are divided into.
          use_bias: Whether to add a bias per channel.
          dtype: Dtype to compute in.
          rngs: Random streams.
        """
        held = weight_dtype(dtype)
        shape = (size, size, in_features // groups, out_features)
        # Fan out as in the residual networks' paper: it keeps the gradient's variance.
        deviation = (2.0 * groups / (size * size * out_features)) ** 0.5
        self.kernel = nnx.Param(normal(rngs, shape, deviation, held))
        self.bias = nnx.Param(jnp.zeros((out_features,), held)) if use_bias else None
        self.stride = stride
        self.groups = groups
        self.padding = size // 2
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves [batch, height, width, in] into [batch, height', width', out]."""
        y = self.linear(x)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    @property
    def offset(self) -> jax.Array | None:
        """The bias [out], or None."""
        return None if self.bias is None else self.bias[...]

    def linear(self, x: jax.Array) -> jax.Array:
        """Convolves without adding the bias, for a normalisation that takes it as ``offset``."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        geometry = Geometry(kernel.shape[0], self.stride, self.padding)
        if self.groups == 1:
            return convolve(x, kernel, geometry)
        if self.groups == x.shape[-1] == kernel.shape[-1]:
            return depthwise(x, kernel, geometry)
        return xla_convolve(x, kernel, geometry, self.groups)
