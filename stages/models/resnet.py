"""Residual networks (He et al. 2015); a unit is the stem, a residual block or the head.

Convolutions have no bias and He-normal kernels (fan out), the activation is ReLU, the stride of
a bottleneck is in its 3x3 convolution, and a skip is projected where the shape changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx

from stages.layers import Conv, Dense, Dropout, global_average_pool, make_norm, max_pool
from stages.models.blocks import HEAD_GAIN, Options
from stages.unit import Factory

WIDTHS = (64, 128, 256, 512)


class Stem(nnx.Module):
    """3x3 convolution (CIFAR), or 7x7 with stride 2 and 3x3 max pooling (ImageNet)."""

    def __init__(self, channels: int, features: int, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the stem's layers."""
        self.wide = options.stem == "imagenet"
        size, stride = (7, 2) if self.wide else (3, 1)
        self.conv = Conv(channels, features, size, stride=stride, dtype=options.dtype, rngs=rngs)
        self.norm = make_norm(options.norm, features, dtype=options.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        x = jax.nn.relu(self.norm(self.conv(x)))
        return max_pool(x, 3, stride=2, padding=1) if self.wide else x


class ResidualBlock(nnx.Module):
    """A residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck)."""

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        bottleneck: bool,
        options: Options,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the block's layers.

        Args:
          channels: Channels of the input.
          width: Channels of the 3x3 convolutions.
          stride: Stride of the first 3x3 convolution.
          bottleneck: Whether 1x1 convolutions narrow and widen; then 4 x width come out.
          options: What all networks are built with.
          rngs: Random streams.
        """
        make: Any = partial(Conv, dtype=options.dtype, rngs=rngs)
        norm: Any = partial(make_norm, options.norm, dtype=options.dtype, rngs=rngs)
        out = width * expansion(bottleneck)
        if bottleneck:
            plan = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            plan = [(channels, width, 3, stride), (width, width, 3, 1)]
        self.convs = nnx.List([make(a, b, size, stride=step) for a, b, size, step in plan])
        self.norms = nnx.List([norm(b) for _, b, _, _ in plan])
        self.project = stride != 1 or channels != out
        if self.project:
            self.skip_conv = make(channels, out, 1, stride=stride)
            self.skip_norm = norm(out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height', width', out]."""
        y, last = x, len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = jax.nn.relu(y) if index < last else y
        skip = self.skip_norm(self.skip_conv(x)) if self.project else x
        return jax.nn.relu(y + skip)


class ResNetHead(nnx.Module):
    """Global average pooling, dropout and a dense layer."""

    def __init__(self, features: int, options: Options, rngs: nnx.Rngs) -> None:
        """Makes the dense layer."""
        self.dropout = Dropout(options.dropout)
        self.dense = Dense(
            features, options.classes, gain=HEAD_GAIN, dtype=options.dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, features] to logits [batch, classes]."""
        return self.dense(self.dropout(global_average_pool(x)))


# Blocks per resolution, and whether they are bottlenecks.
DEPTHS: dict[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


def expansion(bottleneck: bool) -> int:
    """Channels that come out of a block for each channel of its 3x3 convolutions."""
    return 4 if bottleneck else 1


def resnet_units(name: str, options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a residual network."""
    depths, bottleneck = DEPTHS[name]
    units: list[tuple[str, Factory]] = [
        ("stem", partial(Stem, options.input_shape[2], WIDTHS[0], options))
    ]
    channels = WIDTHS[0]
    for group, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
        for place in range(depth):
            stride = 2 if group > 0 and place == 0 else 1
            block = partial(ResidualBlock, channels, width, stride, bottleneck, options)
            units.append((f"block{len(units)}", block))
            channels = width * expansion(bottleneck)
    units.append(("head", partial(ResNetHead, channels, options)))
    return units
