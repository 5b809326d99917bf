"""Models for samples of several lengths: one set of weights, compiled for each length.

The length is the first axis of a sample's input. What else of a sample has a first axis as long as
the longest input is of positions and varies with it; see ``pipar_jax/data/padding.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import jax

from stages.errors import StageError
from stages.model import Model


def padded_to(model: Model, lengths: Sequence[int]) -> Model:
    """Returns a model for mini-batches that are padded to one of several lengths.

    Its own shapes are those of the longest.

    Args:
      model: The model, for samples of the longest length.
      lengths: The lengths, rising; none: the model as it is.

    Raises:
      StageError: The network does not take a length, or is another network with it.
    """
    if not lengths:
        return model
    if not model.input_shape or model.input_shape[0] != lengths[-1]:
        raise StageError(
            f"model {model.name!r} takes samples {list(model.input_shape)}, and the longest length "
            f"is {lengths[-1]}: build it for that one"
        )
    made = copy.copy(model)
    made.lengths = tuple(lengths)
    for unit in made.units:
        unit.expect_lengths(made.lengths)
    for variant in variants(made):
        length = variant.input_shape[0]
        try:
            variant.shapes(1)
            if variant.targets is not None:
                variant.check_task()
        except StageError as error:
            raise StageError(f"{error}; it must take every length of {list(lengths)}, and does "
                             f"not take {length}") from error  # fmt: skip
    return made


def variants(model: Model) -> tuple[Model, ...]:
    """Returns the model for each length of its samples: itself for the longest, which is last."""
    return (*(at_length(model, length) for length in model.lengths[:-1]), model)


def at_length(model: Model, length: int) -> Model:
    """Returns the model for samples of another length; weights and programs are shared.

    Args:
      model: A model that ``padded_to`` has returned.
      length: One of its lengths.
    """
    longest = model.input_shape[0]
    if length == longest:
        return model
    made = copy.copy(model)
    made.input_shape = (length, *model.input_shape[1:])
    made.sides = _at_length(model.sides, longest, length)
    if model.targets is not None:
        made.targets = _at_length(model.targets, longest, length)
    return made


def _at_length(
    samples: Mapping[str, jax.ShapeDtypeStruct], longest: int, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns abstract arrays of a sample, those of positions with another length."""
    return {
        name: jax.ShapeDtypeStruct((length, *one.shape[1:]), one.dtype)  # type: ignore
        if one.shape[:1] == (longest,)
        else one
        for name, one in samples.items()
    }
