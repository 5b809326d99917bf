"""A small decoder-only transformer and a small vision transformer.

Blocks are pre-norm: attention and a feed-forward layer of four times the width with GELU, each
added to what came in. Kernels are normal of variance 1 / fan in, biases zero, embeddings
normal of deviation 0.02. A unit is the embedding, a block or the head.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.layers import Dense, Dropout
from stages.layers.dtypes import weight_dtype
from stages.layers.initializers import normal
from stages.models.blocks import HEAD_GAIN, Options
from stages.unit import Factory


class Size(NamedTuple):
    """Width, heads and number of blocks."""

    width: int
    heads: int
    depth: int


SIZES: dict[str, Size] = {"vit_small": Size(128, 4, 6), "decoder_small": Size(128, 4, 4)}
PATCH = 4


class LayerNorm(nnx.Module):
    """Normalises the last axis (Ba et al. 2016); statistics in at least float32."""

    def __init__(self, features: int, dtype: DTypeLike) -> None:
        """Starts with scale 1 and bias 0."""
        held = weight_dtype(dtype)
        self.scale = nnx.Param(jnp.ones((features,), held))
        self.bias = nnx.Param(jnp.zeros((features,), held))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [batch, …, features]."""
        wide = x.astype(self.scale[...].dtype)
        centred = wide - wide.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        y: jax.Array = centred * inverse * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, size: Size, causal: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Makes the projections."""
        self.inward = Dense(size.width, 3 * size.width, dtype=dtype, rngs=rngs)
        self.outward = Dense(size.width, size.width, dtype=dtype, rngs=rngs)
        self.heads = size.heads
        self.causal = causal

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        parts = self.inward(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = jax.nn.dot_product_attention(
            parts[:, :, 0], parts[:, :, 1], parts[:, :, 2], is_causal=self.causal
        )
        y: jax.Array = self.outward(mixed.reshape(batch, tokens, width))
        return y


class TransformerBlock(nnx.Module):
    """Attention and feed-forward layer, each with a skip connection and dropout."""

    def __init__(self, size: Size, causal: bool, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the block's layers."""
        self.norm1, self.norm2 = (LayerNorm(size.width, options.dtype) for _ in range(2))
        self.attention = Attention(size, causal, options.dtype, rngs)
        self.widen = Dense(size.width, 4 * size.width, dtype=options.dtype, rngs=rngs)
        self.narrow = Dense(4 * size.width, size.width, dtype=options.dtype, rngs=rngs)
        self.dropout1, self.dropout2 = Dropout(options.dropout), Dropout(options.dropout)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to the same shape."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        wide = jax.nn.gelu(self.widen(self.norm2(x)))
        y: jax.Array = x + self.dropout2(self.narrow(wide))
        return y


class PatchEmbedding(nnx.Module):
    """Cuts images into 4x4 patches, projects them and adds learned positions."""

    def __init__(self, size: Size, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the projection and the positions."""
        height, width, channels = options.input_shape
        tokens = (height // PATCH) * (width // PATCH)
        self.project = Dense(PATCH * PATCH * channels, size.width, dtype=options.dtype, rngs=rngs)
        self.positions = _embedding(tokens, size.width, options.dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, tokens, width]."""
        batch, height, width, channels = x.shape
        rows, columns = height // PATCH, width // PATCH
        tiles = x.reshape(batch, rows, PATCH, columns, PATCH, channels).transpose(0, 1, 3, 2, 4, 5)
        y: jax.Array = self.project(tiles.reshape(batch, rows * columns, -1))
        y += self.positions[...].astype(y.dtype)
        return y


class TokenEmbedding(nnx.Module):
    """Looks tokens up and adds learned positions."""

    def __init__(
        self, size: Size, length: int, vocabulary: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Draws both tables; ``length`` is that of the longest sequence."""
        self.tokens = _embedding(vocabulary, size.width, dtype, rngs)
        self.positions = _embedding(length, size.width, dtype, rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [batch, length] int32 to [batch, length, width]."""
        y: jax.Array = self.tokens[...][x] + self.positions[...][: x.shape[1]]
        return y.astype(self.dtype)


class TransformerHead(nnx.Module):
    """Normalisation, perhaps the mean over tokens, and the logits."""

    def __init__(
        self, size: Size, classes: int, pooled: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Makes the last layers."""
        self.norm = LayerNorm(size.width, dtype)
        self.dense = Dense(size.width, classes, gain=HEAD_GAIN, dtype=dtype, rngs=rngs)
        self.pooled = pooled

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to [batch, classes] or [batch, tokens, classes]."""
        y = self.norm(x)
        return self.dense(y.mean(1) if self.pooled else y)


def vit_units(name: str, options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a vision transformer (Dosovitskiy et al. 2020) with mean pooling.

    Raises:
      StageError: 4x4 patches do not tile the images.
    """
    size = SIZES[name]
    if options.input_shape[0] % PATCH or options.input_shape[1] % PATCH:
        raise StageError(
            f"model {name!r}: images of {options.input_shape} are not tiled by {PATCH}x{PATCH} "
            f"patches; crop or pad them to multiples of {PATCH}"
        )
    units: list[tuple[str, Factory]] = [("embed", partial(PatchEmbedding, size, options))]
    for index in range(1, size.depth + 1):
        units.append((f"block{index}", partial(TransformerBlock, size, False, options)))
    head = partial(TransformerHead, size, options.classes, True, options.dtype)
    return [*units, ("head", head)]


def decoder_units(name: str, length: int, options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a decoder-only transformer that predicts each next token."""
    size = SIZES[name]
    embed = partial(TokenEmbedding, size, length, options.classes, options.dtype)
    units: list[tuple[str, Factory]] = [("embed", embed)]
    for index in range(1, size.depth + 1):
        units.append((f"block{index}", partial(TransformerBlock, size, True, options)))
    head = partial(TransformerHead, size, options.classes, False, options.dtype)
    return [*units, ("head", head)]


def _embedding(rows: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    """Draws a table of embeddings."""
    return nnx.Param(normal(rngs, (rows, width), 0.02, weight_dtype(dtype)))
