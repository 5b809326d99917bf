"""Augmentation of training samples: shifts and flips of images, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array
from pipar_jax.config import plugins
from pipar_jax.data.types import ArrayOrDict, named
from pipar_jax.errors import DataError
from stages.signature import INPUT

NO_AUGMENTATION, CROP_FLIP = "none", "crop_flip"
#: Maximum shift of crop_flip in pixels, in each direction.
PADDING = 4

#: Changes a sample: its input (or, where there are side inputs, its inputs by name) and a random
#: number generator that depends on seed, device, epoch and sample only.
Augment: TypeAlias = Callable[[ArrayOrDict, np.random.Generator], ArrayOrDict]


def find_augmentation(name: str) -> str | Augment:
    """Returns the augmentation of a configured name: ``none``, ``crop_flip`` or a function.

    Raises:
      DataError: The user's function cannot be found.
    """
    if not name.startswith("module:"):
        return name
    return plugins.find(name.removeprefix("module:"), f"data.augment={name}", DataError)


def augmented(
    inputs: Mapping[str, Array], function: Augment, seeds: Sequence[Sequence[int]]
) -> dict[str, Array]:
    """Returns a mini-batch's inputs, each sample changed by the user's function.

    Args:
      inputs: [samples, …] each, as stored.
      function: The function.
      seeds: The seed of each sample's draws.

    Raises:
      DataError: The function failed, or returned other names, shapes or dtypes.
    """
    made = {name: np.empty_like(one) for name, one in inputs.items()}
    single = len(inputs) == 1
    for i, seed in enumerate(seeds):
        draw = np.random.default_rng(np.random.SeedSequence(seed))
        sample = {name: one[i] for name, one in inputs.items()}
        given = named(function(sample[INPUT] if single else sample, draw), INPUT)
        expected = {name: (one.shape, one.dtype) for name, one in sample.items()}
        actual = {name: (np.shape(one), np.asarray(one).dtype) for name, one in given.items()}
        if actual != expected:
            raise DataError(
                f"data.augment returned {_shown(actual)} for a sample of {_shown(expected)}: keep "
                "names, shapes and dtypes"
            )
        for name, one in given.items():
            made[name][i] = one
    return made


def _shown(types: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in types.items())


def crop_flip(images: Array, draws: NDArray[np.intp]) -> Array:
    """Returns images shifted by up to PADDING pixels, padded by zeros, and optionally mirrored.

    The augmentation of the PiPar paper's CIFAR runs: pad by four, crop at random, flip at random.

    Args:
      images: [samples, height, width, channels].
      draws: [samples, 3]: first row and first column of the crop in the padded image, and whether
        it is mirrored.
    """
    count, height, width, channels = images.shape
    padded = np.zeros((count, height + 2 * PADDING, width + 2 * PADDING, channels), images.dtype)
    padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = images
    made = np.empty_like(images)
    # A loop over slices is three times as fast as indexing by arrays of rows and columns.
    for i, (top, left, mirror) in enumerate(draws.tolist()):
        crop = padded[i, top : top + height, left : left + width]
        made[i] = crop[:, ::-1] if mirror else crop
    return made
