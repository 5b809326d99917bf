"""Builds the registered models by name."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.model import Model
from stages.models.blocks import Options
from stages.models.mobilenet import mobilenet_units
from stages.models.resnet import resnet_units
from stages.models.transformer import decoder_units, vit_units
from stages.models.vgg import mlp_units, vgg_units
from stages.names import MODELS, NORMS, STEMS, check


def build(
    name: str,
    *,
    input_shape: Sequence[int],
    classes: int,
    norm: str = "batch",
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    dropout: float = 0.0,
) -> Model:
    """Builds a registered model.

    Args:
      name: One of ``stages.MODELS``.
      input_shape: (height, width, channels) of a sample; (tokens,) for a decoder.
      classes: Number of classes; the vocabulary of a decoder.
      norm: "batch" or "group"; perceptron and transformers have neither.
      stem: "cifar" or "imagenet", for the networks that have both.
      dtype: Dtype to compute in; weights of 16-bit models are kept in float32.
      dropout: Probability of dropping an activation, in hidden dense layers, before the last
        layer of residual networks, and in the blocks of transformers.

    Raises:
      StageError: A name is unknown or the samples' shape does not suit the network.
    """
    check("model", name, MODELS)
    check("norm", norm, NORMS)
    check("stem", stem, STEMS)
    shape = tuple(int(size) for size in input_shape)
    wanted = 1 if name.startswith("decoder") else 3
    if len(shape) != wanted or min(shape) < 1:
        expected = "(tokens,)" if wanted == 1 else "(height, width, channels)"
        raise StageError(f"model {name!r}: input_shape must be {expected}, got {shape}")
    image = (shape[0], shape[1], shape[2]) if wanted == 3 else (shape[0], 1, 1)
    options = Options(image, classes, norm, stem, jnp.dtype(dtype), dropout)
    if name == "mlp":
        units = mlp_units(options)
    elif name.startswith("resnet"):
        units = resnet_units(name, options)
    elif name.startswith("mobilenet"):
        units = mobilenet_units(name, options)
    elif name.startswith("vit"):
        units = vit_units(name, options)
    elif name.startswith("decoder"):
        units = decoder_units(name, shape[0], options)
    else:
        units = vgg_units(name, options)
    tokens = name.startswith("decoder")
    model = Model.from_units(
        name, units, shape, classes, input_dtype=jnp.int32 if tokens else jnp.float32
    )
    model.recipe = {
        "name": name, "input_shape": list(shape), "classes": classes, "norm": norm, "stem": stem,
        "dtype": jnp.dtype(dtype).name, "dropout": dropout,
    }  # fmt: skip
    return model
