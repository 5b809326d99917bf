"""Blocks that several networks share."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from stages.layers import Conv, Dense, Dropout, Flatten, make_norm, max_pool

# A small last layer starts the loss at log(classes), where large steps are safe.
HEAD_GAIN = 0.1


class Options(NamedTuple):
    """The options of all networks.

    Attributes:
      input_shape: (height, width, channels) of a sample.
      classes: Number of classes.
      norm: "batch" or "group".
      stem: "cifar" (3x3) or "imagenet" (7x7 and pooling), where a network has both.
      dtype: Dtype to compute in.
      dropout: Probability of dropping an activation before a dense layer of the head.
    """

    input_shape: tuple[int, int, int]
    classes: int
    norm: str
    stem: str
    dtype: DTypeLike
    dropout: float = 0.0


class ConvBlock(nnx.Module):
    """3x3 convolution with bias, normalisation, ReLU and optional 2x2 max pooling."""

    def __init__(
        self, in_features: int, out_features: int, pool: bool, options: Options, rngs: nnx.Rngs
    ) -> None:
        """Makes the block's layers."""
        self.conv = Conv(
            in_features, out_features, 3, use_bias=True, dtype=options.dtype, rngs=rngs
        )
        self.norm = make_norm(options.norm, out_features, dtype=options.dtype, rngs=rngs)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, height', width', out]."""
        x = jax.nn.relu(self.norm(self.conv.linear(x), self.conv.offset))
        return max_pool(x, 2) if self.pool else x


class DenseBlock(nnx.Module):
    """Flattening, a dense layer, and optionally a ReLU and dropout."""

    def __init__(
        self, in_features: int, out_features: int, relu: bool, options: Options, rngs: nnx.Rngs
    ) -> None:
        """Makes the block's layers."""
        self.flatten = Flatten()
        self.dropout = Dropout(options.dropout)
        gain = 2.0 if relu else HEAD_GAIN
        self.dense = Dense(in_features, out_features, gain=gain, dtype=options.dtype, rngs=rngs)
        self.relu = relu

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, …] to [batch, out]."""
        y = self.dense(self.flatten(x))
        return self.dropout(jax.nn.relu(y)) if self.relu else y
