"""Data sets: two splits of images and labels, and their normalisation."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one split of a data set.

    Attributes:
      images: [samples, height, width, channels] uint8 or float32, as stored (never scaled),
        possibly memory-mapped.
      labels: [samples] int32.
    """

    images: Array
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.labels)

    def take(self, indices: NDArray[np.intp]) -> Split:
        """Returns a copy of the samples at given positions, in memory."""
        # Indexing a plain view: copies of a memmap would still be of type memmap.
        return Split(np.asarray(self.images)[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data set of one host.

    Attributes:
      source: Source of the data, as in ``data.source``.
      train: Training samples; on a device, its own.
      test: Test samples; none on a device.
      classes: Number of classes.
      input_shape: Height, width and channels of an image.
      mean: [channels] float32, in units of the stored images.
      std: [channels] float32, in units of the stored images. Only these two define the scale of
        numbers, not the images' dtype.
    """

    source: str
    train: Split
    test: Split
    classes: int
    input_shape: tuple[int, int, int]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def normalise(self, images: Array) -> NDArray[np.float32]:
        """Returns (images - mean) / std as [samples, …] float32, a new array."""
        return normalise(images, self.mean, self.std)


def normalise(
    images: Array, mean: NDArray[np.float32], std: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Returns (images - mean) / std as [samples, …, channels] float32, a new array."""
    # One multiplication and one addition in place: half the memory traffic of the formula.
    made: NDArray[np.float32] = np.multiply(images, np.float32(1) / std, dtype=np.float32)
    made -= mean / std
    return made


def empty_split(input_shape: tuple[int, int, int]) -> Split:
    """Returns a split without samples."""
    return Split(np.zeros((0, *input_shape), np.uint8), np.zeros(0, np.int32))
