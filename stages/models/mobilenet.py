"""MobileNetV3-Small and -Large (Howard et al. 2019, tables 1 and 2).

A unit is the stem, an inverted residual block, the last convolution with its pooling, or the
head. Convolutions have no bias and He-normal kernels (fan out); activations are ReLU and
hard-swish as in the tables. With the CIFAR stem the first convolution has stride 1, since the
network's stride of 32 would leave one pixel of a 32x32 image long before its end.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from stages.layers import Conv, Dense, Dropout, global_average_pool, make_norm
from stages.models.blocks import HEAD_GAIN, Options
from stages.unit import Factory


class BlockRow(NamedTuple):
    """A row of the paper's tables: kernel, expanded and output channels, flags and stride."""

    size: int
    expanded: int
    out: int
    squeeze: bool
    swish: bool
    stride: int


def _rows(text: str) -> tuple[BlockRow, ...]:
    """Reads "3 16 16 S R 2; …": S or - for squeeze and excitation, H or R for the activation."""
    rows = []
    for line in text.split(";"):
        size, expanded, out, squeeze, activation, stride = line.split()
        rows.append(
            BlockRow(
                int(size), int(expanded), int(out), squeeze == "S", activation == "H", int(stride)
            )
        )
    return tuple(rows)


SMALL = _rows(
    "3 16 16 S R 2; 3 72 24 - R 2; 3 88 24 - R 1; 5 96 40 S H 2; 5 240 40 S H 1; 5 240 40 S H 1;"
    "5 120 48 S H 1; 5 144 48 S H 1; 5 288 96 S H 2; 5 576 96 S H 1; 5 576 96 S H 1"
)
LARGE = _rows(
    "3 16 16 - R 1; 3 64 24 - R 2; 3 72 24 - R 1; 5 72 40 S R 2; 5 120 40 S R 1; 5 120 40 S R 1;"
    "3 240 80 - H 2; 3 200 80 - H 1; 3 184 80 - H 1; 3 184 80 - H 1; 3 480 112 S H 1;"
    "3 672 112 S H 1; 5 672 160 S H 2; 5 960 160 S H 1; 5 960 160 S H 1"
)
# Rows, channels of the last convolution, width of the hidden dense layer.
PLANS: dict[str, tuple[tuple[BlockRow, ...], int, int]] = {
    "mobilenetv3_small": (SMALL, 576, 1024),
    "mobilenetv3_large": (LARGE, 960, 1280),
}


class ConvNorm(nnx.Module):
    """Convolution, normalisation and an activation: "relu", "swish" or "none"."""

    def __init__(
        self,
        channels: int,
        out: int,
        size: int,
        activation: str,
        options: Options,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        """Makes the layers."""
        self.conv = Conv(
            channels, out, size, stride=stride, groups=groups, dtype=options.dtype, rngs=rngs
        )
        self.norm = make_norm(options.norm, out, dtype=options.dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height', width', out]."""
        y = self.norm(self.conv(x))
        if self.activation == "none":
            return y
        return jax.nn.relu(y) if self.activation == "relu" else jax.nn.hard_swish(y)


class Squeeze(nnx.Module):
    """Squeeze and excitation: channels are scaled by a gate that sees the whole image."""

    def __init__(self, channels: int, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the two dense layers."""
        narrow = divisible(channels // 4)
        make: Any = partial(Dense, dtype=options.dtype, rngs=rngs)
        self.reduce = make(channels, narrow, gain=2.0)
        self.expand = make(narrow, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the channels of [batch, height, width, channels]."""
        gate = jax.nn.relu(self.reduce(global_average_pool(x)))
        scaled: jax.Array = x * jax.nn.hard_sigmoid(self.expand(gate))[:, None, None]
        return scaled


class InvertedResidual(nnx.Module):
    """Expansion, depthwise convolution, optional squeeze and excitation, projection, skip."""

    def __init__(self, channels: int, row: BlockRow, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the block's layers."""
        activation = "swish" if row.swish else "relu"
        make: Any = partial(ConvNorm, options=options, rngs=rngs)
        wide = row.expanded
        self.widen = make(channels, wide, 1, activation) if wide != channels else None
        self.depthwise = make(wide, wide, row.size, activation, stride=row.stride, groups=wide)
        self.squeeze = Squeeze(wide, options, rngs) if row.squeeze else None
        self.narrow = make(wide, row.out, 1, "none")
        self.skip = row.stride == 1 and channels == row.out

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height', width', out]."""
        y: jax.Array = x if self.widen is None else self.widen(x)
        y = self.depthwise(y)
        y = y if self.squeeze is None else self.squeeze(y)
        y = self.narrow(y)
        return x + y if self.skip else y


class Tail(nnx.Module):
    """The last 1x1 convolution and global average pooling, together so that a cut is cheap."""

    def __init__(self, channels: int, out: int, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the convolution."""
        self.conv = ConvNorm(channels, out, 1, "swish", options, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, out]."""
        return global_average_pool(self.conv(x))


class MobileNetHead(nnx.Module):
    """Two dense layers with hard-swish and dropout between."""

    def __init__(self, features: int, hidden: int, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the dense layers."""
        make: Any = partial(Dense, dtype=options.dtype, rngs=rngs)
        self.first = make(features, hidden, gain=2.0)
        self.dropout = Dropout(options.dropout)
        self.second = make(hidden, options.classes, gain=HEAD_GAIN)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, features] to logits [batch, classes]."""
        logits: jax.Array = self.second(self.dropout(jax.nn.hard_swish(self.first(x))))
        return logits


def mobilenet_units(name: str, options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a MobileNetV3."""
    rows, last, hidden = PLANS[name]
    channels = 16
    stride = 2 if options.stem == "imagenet" else 1
    stem = partial(ConvNorm, options.input_shape[2], channels, 3, "swish", options, stride=stride)
    units: list[tuple[str, Factory]] = [("stem", lambda rngs: stem(rngs=rngs))]
    for index, row in enumerate(rows, start=1):
        units.append((f"block{index}", partial(InvertedResidual, channels, row, options)))
        channels = row.out
    units.append(("tail", partial(Tail, channels, last, options)))
    units.append(("head", partial(MobileNetHead, last, hidden, options)))
    return units


def divisible(value: int) -> int:
    """Rounds to a multiple of 8 that is at least 0.9 of the value, as the authors' code does."""
    rounded = max(8, (value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded
