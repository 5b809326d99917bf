"""Builds the registered models by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.layers.dtypes import weight_dtype
from stages.layers.lora import ADAPTERS, LoraSettings, adapted
from stages.model import Model
from stages.models.blocks import Options
from stages.models.gpt2 import gpt2_units
from stages.models.mobilenet import mobilenet_units
from stages.models.resnet import resnet_units
from stages.models.transformer import decoder_units, vit_units
from stages.models.vgg import mlp_units, vgg_units
from stages.names import MODELS, NORMS, STEMS, TOKEN_MODELS, arguments_of, check
from stages.unit import Factory


def build(
    name: str,
    *,
    input_shape: Sequence[int],
    classes: int,
    norm: str = "batch",
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    dropout: float = 0.0,
    arguments: Mapping[str, int] | None = None,
    lora: LoraSettings | Sequence[Any] | None = None,
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
      arguments: Arguments of networks that have some: those of ``stages.names.ARGUMENTS``.
      lora: Adapters on dense layers; their weights are ``…/lora/a`` and ``…/lora/b``.

    Raises:
      StageError: A name or an argument is unknown, the samples' shape does not suit the network, or
        no dense layer matches ``lora.match``.
    """
    check("model", name, MODELS)
    check("norm", norm, NORMS)
    check("stem", stem, STEMS)
    shape = tuple(int(size) for size in input_shape)
    wanted = 1 if name in TOKEN_MODELS else 3
    given = arguments_of(name, arguments or {})
    if len(shape) != wanted or min(shape) < 1:
        expected = "(tokens,)" if wanted == 1 else "(height, width, channels)"
        raise StageError(f"model {name!r}: input_shape must be {expected}, got {shape}")
    image = (shape[0], shape[1], shape[2]) if wanted == 3 else (shape[0], 1, 1)
    options = Options(image, classes, norm, stem, jnp.dtype(dtype), dropout)
    units = _units(name, shape[0], given, options)
    if lora is not None:
        lora = LoraSettings(*lora)
        units = [(unit, adapted(unit, factory, lora)) for unit, factory in units]
    # As hosts compute their samples: stages are compiled for these before the first round.
    input_dtype = jnp.int32 if wanted == 1 else weight_dtype(dtype)
    model = Model.from_units(name, units, shape, classes, input_dtype=input_dtype)
    if lora is not None:
        _check_adapters(model, lora)
    model.recipe = {
        "name": name, "input_shape": list(shape), "classes": classes, "norm": norm, "stem": stem,
        "dtype": jnp.dtype(dtype).name, "dropout": dropout,
        "arguments": dict(arguments or {}), "lora": None if lora is None else list(lora),
    }  # fmt: skip
    return model


def _units(
    name: str, tokens: int, arguments: Mapping[str, int], options: Options
) -> list[tuple[str, Factory]]:
    """Returns a network's units in order.

    Raises:
      StageError: The samples are longer than what a decoder has positions for.
    """
    if name == "mlp":
        return mlp_units(options)
    if name.startswith("resnet"):
        return resnet_units(name, options)
    if name.startswith("mobilenet"):
        return mobilenet_units(name, options)
    if name.startswith("vit"):
        return vit_units(name, options)
    if name == "gpt2":
        if tokens > arguments["positions"]:
            raise StageError(
                f"model {name!r}: samples of {tokens} tokens are longer than "
                f"positions={arguments['positions']}: cut them, or raise positions"
            )
        return gpt2_units(arguments, options)
    if name.startswith("decoder"):
        return decoder_units(name, tokens, options)
    return vgg_units(name, options)


def _check_adapters(model: Model, lora: LoraSettings) -> None:
    """Checks that there are adapters.

    Raises:
      StageError: No layer matched.
    """
    names = [f"{unit.name}/{path}" for unit in model.units for path in unit.params]
    if not any(ADAPTERS in name for name in names):
        raise StageError(
            f"model {model.name!r}: lora.match={lora.match!r} matches none of its dense layers "
            "(names are unit/path, such as block1/attention/inward)"
        )
