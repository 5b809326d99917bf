"""GPT-2's architecture (Radford et al. 2019), and its weights in the layout of Hugging Face.

Learned positions, layer normalisation before attention and feed-forward layer, GELU by tanh, a
last normalisation, and logits by the token table. A unit is the embedding, a block or the head.
The head has a copy of the token table of its own, since a weight on both sides of a cut could not
be trained: frozen, as under LoRA, both stay equal; trained, they part.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from stages.layers import Dense
from stages.models.blocks import HEAD_GAIN, Options
from stages.models.transformer import LayerNorm, Size, TokenEmbedding, TransformerBlock
from stages.unit import Factory

T = TypeVar("T")

#: For each layer of a block its name in the layout of Hugging Face; dense layers are [in, out].
_BLOCK = {
    "norm1": "ln_1", "attention/inward": "attn.c_attn", "attention/outward": "attn.c_proj",
    "norm2": "ln_2", "widen": "mlp.c_fc", "narrow": "mlp.c_proj",
}  # fmt: skip
_PREFIX = "transformer."


class Gpt2Head(nnx.Module):
    """The last normalisation and the logits."""

    def __init__(self, width: int, vocabulary: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Makes the layers."""
        self.norm = LayerNorm(width, dtype)
        self.dense = Dense(
            width, vocabulary, gain=HEAD_GAIN, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to [batch, tokens, vocabulary]."""
        return self.dense(self.norm(x))


def gpt2_units(arguments: Mapping[str, int], options: Options) -> list[tuple[str, Factory]]:
    """Lists the units.

    Args:
      arguments: ``width``, ``heads``, ``depth`` and ``positions`` (the longest sequence).
      options: Options of all networks; ``classes`` is the vocabulary.
    """
    size = Size(arguments["width"], arguments["heads"], arguments["depth"])
    embed = partial(TokenEmbedding, size, arguments["positions"], options.classes, options.dtype)
    units: list[tuple[str, Factory]] = [("embed", embed)]
    for index in range(1, size.depth + 1):
        units.append((f"block{index}", partial(TransformerBlock, size, True, options)))
    return [*units, ("head", partial(Gpt2Head, size.width, options.classes, options.dtype))]


def hugging_face_name(unit: str, path: str) -> tuple[str, bool]:
    """Returns the name of a weight in the layout of Hugging Face, and whether it is transposed.

    Args:
      unit: Name of a unit of ``gpt2_units``.
      path: Path of the weight in it; adapters have no name there, and get one that is in no file.
    """
    if unit == "embed":
        return {"tokens": "wte.weight", "positions": "wpe.weight"}.get(path, path), False
    layer, _, kind = path.rpartition("/")
    last = "bias" if kind == "bias" else "weight"
    if unit == "head":
        return ("lm_head.weight", True) if layer == "dense" else (f"ln_f.{last}", False)
    return f"h.{int(unit.removeprefix('block')) - 1}.{_BLOCK.get(layer, layer)}.{last}", False


def find_weight(names: Mapping[str, T], unit: str, path: str) -> tuple[T, bool] | None:
    """Returns a weight of a file in the layout of Hugging Face, and whether it is transposed.

    A file without ``lm_head.weight`` has tied weights: the head takes the token table.

    Args:
      names: What the file has, by name, with or without the prefix ``transformer.``.
      unit: Name of a unit.
      path: Path of the weight in it.
    """
    name, transposed = hugging_face_name(unit, path)
    choices = [name, *(["wte.weight"] if name == "lm_head.weight" else [])]
    for choice in choices:
        for known in (choice, _PREFIX + choice):
            if known in names:
                return names[known], transposed
    return None
