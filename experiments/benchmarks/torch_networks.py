"""The networks of ``stages.models`` in PyTorch, for comparison.

They have the same layers in the same order with the same shapes and number of parameters (tested if
torch is installed). torch is an extra and is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from stages.models.mobilenet import PLANS as MOBILENETS
from stages.models.mobilenet import divisible
from stages.models.resnet import DEPTHS, WIDTHS, expansion
from stages.models.vgg import PLANS as VGGS
from stages.models.vgg import read_blocks

#: Names of the networks.
NAMES = (*VGGS, *DEPTHS, *MOBILENETS)


def build(
    name: str, channels: int = 3, classes: int = 10, height: int = 32, stem: str = "cifar"
) -> Any:
    """Returns a ``torch.nn.Module`` for [batch, channels, height, height].

    Args:
      name: One of ``NAMES``: a VGG, a residual network or a MobileNetV3 of ``stages.MODELS``.
      channels: Channels of the images.
      classes: Number of classes.
      height: Height and width of the images.
      stem: "cifar" or "imagenet", for the networks that have both.

    Raises:
      ModuleNotFoundError: Torch is not installed.
    """
    nn = importlib.import_module("torch.nn")
    if name in VGGS:
        return _vgg(nn, name, channels, classes, height)
    if name in DEPTHS:
        return _resnet(nn, name, channels, classes, stem)
    return _mobilenet(nn, name, channels, classes, stem)


def _vgg(nn: Any, name: str, channels: int, classes: int, height: int) -> Any:
    text, hidden = VGGS[name]
    layers: list[Any] = []
    for features, pool in read_blocks(text):
        layers += [nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features)]
        layers.append(nn.ReLU(inplace=True))
        if pool and height > 1:
            layers.append(nn.MaxPool2d(2))
            height //= 2
        channels = features
    layers.append(nn.Flatten())
    width = channels * height * height
    for features in hidden:
        layers += [nn.Linear(width, features), nn.ReLU(inplace=True)]
        width = features
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _residual(nn: Any, inner: Any, skip: Any, relu: bool) -> Any:
    """Returns inner(x) + skip(x), optionally followed by a ReLU."""

    class Residual(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.skip = inner, skip
            self.last = nn.ReLU(inplace=True) if relu else nn.Identity()

        def forward(self, x: Any) -> Any:
            return self.last(self.inner(x) + self.skip(x))

    return Residual()


def _conv_norm(
    nn: Any, channels: int, out: int, size: int, stride: int = 1, groups: int = 1
) -> list[Any]:
    conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


def _resnet(nn: Any, name: str, channels: int, classes: int, stem: str) -> Any:
    depths, bottleneck = DEPTHS[name]
    size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    layers = [*_conv_norm(nn, channels, WIDTHS[0], size, stride), nn.ReLU(inplace=True)]
    if stem == "imagenet":
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = WIDTHS[0]
    for group, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
        for place in range(depth):
            stride = 2 if group > 0 and place == 0 else 1
            out = width * expansion(bottleneck)
            if bottleneck:
                plan = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
            else:
                plan = [(channels, width, 3, stride), (width, width, 3, 1)]
            inner: list[Any] = []
            for a, b, size, step in plan:
                inner += [*_conv_norm(nn, a, b, size, step), nn.ReLU(inplace=True)]
            skip = nn.Identity()
            if stride != 1 or channels != out:
                skip = nn.Sequential(*_conv_norm(nn, channels, out, 1, stride))
            layers.append(_residual(nn, nn.Sequential(*inner[:-1]), skip, relu=True))
            channels = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


def _mobilenet(nn: Any, name: str, channels: int, classes: int, stem: str) -> Any:
    rows, last, hidden = MOBILENETS[name]
    stride = 2 if stem == "imagenet" else 1
    layers = [*_conv_norm(nn, channels, 16, 3, stride), nn.Hardswish(inplace=True)]
    channels = 16
    for row in rows:
        activation = nn.Hardswish if row.swish else nn.ReLU
        wide = row.expanded
        inner: list[Any] = []
        if wide != channels:
            inner += [*_conv_norm(nn, channels, wide, 1), activation(inplace=True)]
        inner += [*_conv_norm(nn, wide, wide, row.size, row.stride, wide), activation(inplace=True)]
        if row.squeeze:
            inner.append(_squeeze(nn, wide))
        inner += _conv_norm(nn, wide, row.out, 1)
        block = nn.Sequential(*inner)
        same = row.stride == 1 and channels == row.out
        layers.append(_residual(nn, block, nn.Identity(), relu=False) if same else block)
        channels = row.out
    layers += [*_conv_norm(nn, channels, last, 1), nn.Hardswish(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, hidden)]
    return nn.Sequential(*layers, nn.Hardswish(inplace=True), nn.Linear(hidden, classes))


def _squeeze(nn: Any, channels: int) -> Any:
    """Squeeze and excitation as in torchvision, with 1x1 convolutions."""
    narrow = divisible(channels // 4)

    class Squeeze(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, narrow, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(narrow, channels, 1),
                nn.Hardsigmoid(),
            )

        def forward(self, x: Any) -> Any:
            return x * self.gate(x)

    return Squeeze()
