"""Models drawn at random, whose layers the latency predictor is trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


def random_chain(seed: int) -> Any:
    """Returns a model of blocks of random kinds and widths."""
    from stages import Model
    from stages.models.blocks import ConvBlock, DenseBlock, Options
    from stages.models.mobilenet import BlockRow, ConvNorm, InvertedResidual
    from stages.models.resnet import ResidualBlock

    rng = np.random.default_rng(seed)
    pick: Callable[..., int] = lambda *values: int(rng.choice(values))  # noqa: E731
    side, channels = pick(16, 24, 28, 32, 48, 64), pick(1, 3, 3)
    shape = (side, side, channels)
    options = Options(shape, 10, "batch", "cifar", np.dtype(np.float32))
    units: list[tuple[str, Any]] = []
    while len(units) < 9 and (side > 2 or len(units) < 5):
        # Large maps have few channels, as in real networks.
        most = 32 if side > 32 else 96 if side > 16 else 256 if side > 6 else 512
        out = min(8 * max(1, round(2 ** rng.uniform(0, 6.2))), most)
        kind, stride = rng.integers(6), pick(1, 2) if side > 2 else 1
        made: Any
        if kind == 0:
            made = partial(ConvBlock, channels, out, stride == 2, options)
        elif kind == 1:
            made = partial(ResidualBlock, channels, out, stride, False, options)
        elif kind == 2:
            width = max(8, out // 4)
            made, out = partial(ResidualBlock, channels, width, stride, True, options), 4 * width
        elif kind == 3:
            row = BlockRow(pick(3, 5), min(channels * pick(2, 3, 6), 640), min(out, 160),
                      bool(rng.integers(2)), bool(rng.integers(2)), stride)  # fmt: skip
            made, out = partial(InvertedResidual, channels, row, options), row.out
        elif kind == 4:
            size = pick(1, 3, 5, 7) if side > 6 else pick(1, 3)
            made = partial(_conv_norm, ConvNorm, channels, out, size, options, stride)
        else:
            groups_out = channels
            made = partial(_conv_norm, ConvNorm, channels, groups_out, pick(3, 5), options, stride,
                           groups=channels)  # fmt: skip
            out = groups_out
            if channels < 8:  # depthwise layers over the channels of an image are not realistic
                continue
        units.append((f"u{len(units)}", made))
        pooled = kind == 0 and stride == 2
        side = side // 2 if pooled else -(-side // stride)
        channels = out
    width = side * side * channels
    for _ in range(pick(1, 2)):
        out = 2 ** pick(5, 7, 8, 9, 10)
        units.append((f"u{len(units)}", partial(DenseBlock, width, out, True, options)))
        width = out
    units.append(("last", partial(DenseBlock, width, 10, False, options)))
    return Model.from_units(f"chain{seed}", units, shape, 10)


def separable_chain(seed: int) -> Any:
    """Returns a model of inverted residuals of random widths, strides and kernels, and a head."""
    from stages import Model
    from stages.models.blocks import DenseBlock, Options
    from stages.models.mobilenet import BlockRow, ConvNorm, InvertedResidual, Tail

    rng = np.random.default_rng(seed)
    pick: Callable[..., int] = lambda *values: int(rng.choice(values))  # noqa: E731
    side, stride, channels = pick(24, 32, 48, 64), pick(1, 2), pick(8, 16, 24, 32)
    shape = (side, side, 3)
    options = Options(shape, 10, "batch", "cifar", np.dtype(np.float32))
    units: list[tuple[str, Any]] = [
        ("stem", partial(_conv_norm, ConvNorm, 3, channels, 3, options, stride))
    ]
    side = -(-side // stride)
    while len(units) < 10:
        stride = pick(1, 1, 2) if side > 2 else 1
        # Large maps have few channels, as in real networks.
        most = 32 if side > 16 else 80 if side > 8 else 160
        out = channels if stride == 1 and pick(0, 1) else min(channels + pick(0, 8, 16, 40), most)
        wide = min(round(channels * float(rng.uniform(1, 6)) / 8) * 8 or 8, 960)
        row = BlockRow(pick(3, 5), wide, out, pick(0, 1, 1) == 1, pick(0, 1) == 1, stride)
        units.append((f"u{len(units)}", partial(InvertedResidual, channels, row, options)))
        side, channels = -(-side // stride), out
    wide = pick(4, 6) * channels
    units.append(("tail", partial(Tail, channels, wide, options)))
    hidden = pick(256, 1024, 1280)
    units.append(("hidden", partial(DenseBlock, wide, hidden, True, options)))
    units.append(("last", partial(DenseBlock, hidden, 10, False, options)))
    return Model.from_units(f"separable{seed}", units, shape, 10)


def _conv_norm(
    made: Any,
    channels: int,
    out: int,
    size: int,
    options: Any,
    stride: int,
    rngs: Any,
    groups: int = 1,
) -> Any:
    return made(channels, out, size, "relu", options, rngs, stride=stride, groups=groups)
