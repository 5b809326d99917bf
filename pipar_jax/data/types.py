"""What a data set is: two splits of images and labels, and how to normalise them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one part of a data set.

    Attributes:
      images: [samples, height, width, channels] uint8 or float32, as they are stored (never
        scaled), perhaps memory-mapped.
      labels: [samples] int32.
    """

    images: NDArray[Any]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.labels)

    def take(self, indices: NDArray[np.intp]) -> Split:
        """Returns a copy of the samples at some positions, held in memory."""
        # Taken from a plain view: a memmap's copies would still call themselves mapped.
        return Split(np.asarray(self.images)[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as one host sees it.

    Attributes:
      source: Where it came from, as ``data.source`` names it.
      train: Training samples; those of one device, where a device loaded it.
      test: Test samples; none on a device.
      classes: Number of classes.
      input_shape: Height, width and channels of an image.
      mean: [channels] float32, in units of the stored images.
      std: [channels] float32, in units of the stored images. These two alone say how numbers are
        scaled; nothing is read from the images' type.
    """

    source: str
    train: Split
    test: Split
    classes: int
    input_shape: tuple[int, int, int]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def normalise(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Returns (images - mean) / std as [samples, …] float32, a fresh array."""
        return normalise(images, self.mean, self.std)


def normalise(
    images: NDArray[Any], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Returns (images - mean) / std as [samples, …, channels] float32, a fresh array."""
    # One multiplication and one addition in place: half the memory traffic of the formula as read.
    made: NDArray[np.float32] = np.multiply(images, np.float32(1) / std, dtype=np.float32)
    made -= mean / std
    return made


def empty_split(input_shape: tuple[int, int, int]) -> Split:
    """Returns a split without samples."""
    return Split(np.zeros((0, *input_shape), np.uint8), np.zeros(0, np.int32))
