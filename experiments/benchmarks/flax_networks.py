"""Networks of ``stages.models`` as a user of Flax writes them, for comparison.

They have the same layers in the same order with the same shapes, with Flax's own convolutions,
normalisation and pooling, and know nothing of stages.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
from flax import nnx

from stages.models.resnet import DEPTHS, WIDTHS
from stages.models.vgg import PLANS, read_blocks

max_pool: Any = nnx.max_pool  # untyped in Flax
#: Networks that there are.
NETWORKS = ("vgg5", "resnet18")


class Vgg(nnx.Module):
    """VGG with batch normalisation for 32x32x3."""

    def __init__(self, name: str, rngs: nnx.Rngs, height: int = 32) -> None:
        """Makes the layers of one of the VGGs."""
        text, hidden = PLANS[name]
        blocks = read_blocks(text)
        convs, channels = [], 3
        for features, pool in blocks:
            convs.append(nnx.Conv(channels, features, (3, 3), rngs=rngs))
            channels, height = features, height // 2 if pool else height
        self.convs = nnx.List(convs)
        self.norms = nnx.List([nnx.BatchNorm(features, rngs=rngs) for features, _ in blocks])
        self.pools = tuple(pool for _, pool in blocks)
        widths = (height * height * channels, *hidden, 10)
        pairs = itertools.pairwise(widths)
        self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, height, 3] to logits [batch, 10]."""
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            x = nnx.relu(norm(conv(x)))
            x = max_pool(x, (2, 2), (2, 2)) if pool else x
        x = x.reshape(x.shape[0], -1)
        for layer in self.dense[:-1]:
            x = nnx.relu(layer(x))
        logits: jax.Array = self.dense[-1](x)
        return logits


class Block(nnx.Module):
    """A basic residual block."""

    def __init__(self, channels: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        """Makes the layers; a skip that changes shape is projected."""
        self.conv1 = nnx.Conv(channels, width, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, rngs=rngs)
        self.projects = stride != 1 or channels != width
        if self.projects:
            self.skip = nnx.Conv(channels, width, (1, 1), stride, use_bias=False, rngs=rngs)
            self.skip_norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height', width', width of the block]."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        skip = self.skip_norm(self.skip(x)) if self.projects else x
        return nnx.relu(y + skip)


class ResNet18(nnx.Module):
    """ResNet-18 with batch normalisation for images of three channels."""

    def __init__(self, stem: str, rngs: nnx.Rngs) -> None:
        """Makes the layers, with a stem of ``stages.STEMS``."""
        self.wide = stem == "imagenet"
        size, stride = (7, 2) if self.wide else (3, 1)
        self.conv = nnx.Conv(3, WIDTHS[0], (size, size), stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTHS[0], rngs=rngs)
        blocks, channels = [], WIDTHS[0]
        for group, (depth, width) in enumerate(zip(DEPTHS["resnet18"][0], WIDTHS, strict=True)):
            for place in range(depth):
                stride = 2 if group > 0 and place == 0 else 1
                blocks.append(Block(channels, width, stride, rngs))
                channels = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, 3] to logits [batch, 10]."""
        x = nnx.relu(self.norm(self.conv(x)))
        if self.wide:
            x = max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        logits: jax.Array = self.head(x.mean((1, 2)))
        return logits


def build(name: str, stem: str, rngs: nnx.Rngs) -> Any:
    """Returns one of ``NETWORKS`` for 32x32x3."""
    return ResNet18(stem, rngs) if name == "resnet18" else Vgg(name, rngs)
