"""VGG networks with normalisation, and the small ones for scikit-learn's digits.

Every convolution is 3x3 with bias, followed by normalisation and ReLU; kernels are He-normal,
biases zero. VGG-5 is FedAdapt's and PiPar's. VGG-11, -16 and -19 have the convolutions of
Simonyan and Zisserman (2014, table 1, columns A, D and E) and, as is usual for small images,
two hidden dense layers of 512. VGG-8 has no agreed definition; ours has one convolution per
resolution. A map of one pixel is pooled no further, so 28x28 images fit as well.
"""

from __future__ import annotations

from functools import partial

from stages.models.blocks import ConvBlock, DenseBlock, Options
from stages.unit import Factory


def read_blocks(text: str) -> tuple[tuple[int, bool], ...]:
    """Reads "64 64p": channels of each convolution block, p where it ends in 2x2 pooling."""
    return tuple((int(word.rstrip("p")), word.endswith("p")) for word in text.split())


# Convolution blocks, and the widths of the hidden dense layers.
PLANS: dict[str, tuple[str, tuple[int, ...]]] = {
    "cnn": ("16 32p 64p", (64,)),
    "vgg5": ("32p 64p 64", (128,)),
    "vgg8": ("64p 128p 256p 512p 512p", (512, 512)),
    "vgg11": ("64p 128p 256 256p 512 512p 512 512p", (512, 512)),
    "vgg16": ("64 64p 128 128p 256 256 256p 512 512 512p 512 512 512p", (512, 512)),
    "vgg19": (
        "64 64p 128 128p 256 256 256 256p 512 512 512 512p 512 512 512 512p",
        (512, 512),
    ),
}


def vgg_units(name: str, options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a VGG-like network; a unit is a convolution block or a dense layer."""
    text, hidden = PLANS[name]
    height, width, channels = options.input_shape
    units: list[tuple[str, Factory]] = []
    for index, (features, wanted) in enumerate(read_blocks(text), start=1):
        pool = wanted and min(height, width) > 1
        units.append((f"conv{index}", partial(ConvBlock, channels, features, pool, options)))
        channels = features
        if pool:
            height, width = height // 2, width // 2
    return units + _dense_units(height * width * channels, hidden, options)


def mlp_units(options: Options) -> list[tuple[str, Factory]]:
    """Lists the units of a multilayer perceptron, 128-128-64; it has no normalisation."""
    height, width, channels = options.input_shape
    return _dense_units(height * width * channels, (128, 128, 64), options)


def _dense_units(
    features_in: int, hidden: tuple[int, ...], options: Options
) -> list[tuple[str, Factory]]:
    """Lists dense units "fc1", "fc2", …, the last of which returns the logits."""
    units: list[tuple[str, Factory]] = []
    for index, features in enumerate((*hidden, options.classes), start=1):
        relu = index <= len(hidden)
        units.append((f"fc{index}", partial(DenseBlock, features_in, features, relu, options)))
        features_in = features
    return units
