"""Examples and data sets: arrays of any shape and dtype, by name, and their normalisation."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from comms.arrays import Array
from stages.signature import INPUT, TARGET, ArrayType, Signature, computed_dtype

#: One array, or arrays by name.
ArrayOrDict: TypeAlias = Array | Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs and targets of some samples.

    Attributes:
      inputs: [samples, …] each, as stored, possibly memory-mapped. The entry ``x`` flows through
        the cuts; all others are side inputs.
      targets: [samples, …] each; a single array is named ``y``.
      lengths: [samples] how long each sample is, where they differ and ``data.pad_to`` is set.
    """

    inputs: Mapping[str, Array]
    targets: Mapping[str, Array]
    lengths: NDArray[np.intp] | None = None

    @classmethod
    def of(cls, inputs: ArrayOrDict, targets: ArrayOrDict) -> Examples:
        """Returns examples of arrays, or of dictionaries of arrays with ``x`` and ``y``."""
        return cls(named(inputs, INPUT), named(targets, TARGET))

    @property
    def x(self) -> Array:
        """The input that flows through the cuts."""
        return self.inputs[INPUT]

    @property
    def sides(self) -> dict[str, Array]:
        """The side inputs by name."""
        return {name: one for name, one in self.inputs.items() if name != INPUT}

    @property
    def labels(self) -> Array:
        """The targets, where they are a single array.

        Raises:
          KeyError: They are not.
        """
        return self.targets[TARGET]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.inputs[INPUT])

    def take(self, indices: NDArray[np.intp]) -> Examples:
        """Returns a copy of the samples at given positions, in memory."""

        # Indexing a plain view: copies of a memmap would still be of type memmap.
        def taken(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: np.asarray(one)[indices] for name, one in arrays.items()}

        lengths = None if self.lengths is None else self.lengths[indices]
        return Examples(taken(self.inputs), taken(self.targets), lengths)

    def empty(self) -> Examples:
        """Returns examples of the same shapes and dtypes without samples."""
        return self.take(np.zeros(0, np.intp))


@dataclasses.dataclass(frozen=True)
class Padding:
    """Which arrays are of positions, and what mini-batches of them are padded to.

    Attributes:
      lengths: The lengths, rising.
      inputs: Names of the inputs of positions.
      targets: Names of the targets of positions.
      fill: Target of a padded position; inputs are padded with zeros.
    """

    lengths: tuple[int, ...]
    inputs: frozenset[str]
    targets: frozenset[str]
    fill: float = 0

    @property
    def longest(self) -> int:
        """The longest length."""
        return self.lengths[-1]

    def holding(self, longest: int) -> int:
        """Returns the smallest length that holds a sample of a length."""
        return self.lengths[bisect.bisect_left(self.lengths, longest)]

    def padded(self, examples: Examples, length: int | None = None) -> Examples:
        """Returns samples with their arrays of positions cut or padded to a length.

        Args:
          examples: The samples, none of which is longer.
          length: The length; None for the longest.
        """
        wanted = self.longest if length is None else length
        return dataclasses.replace(
            examples,
            inputs={
                name: fitted(one, wanted, 0) if name in self.inputs else one
                for name, one in examples.inputs.items()
            },
            targets={
                name: fitted(one, wanted, self.fill) if name in self.targets else one
                for name, one in examples.targets.items()
            },
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data set of one host.

    Attributes:
      source: Source of the data, as in ``data.source``.
      train: Training samples; on a device, its own.
      test: Test samples; none on a device.
      classes: Number of classes, or of outputs per sample; 0 if the data do not tell.
      mean: [channels] float32, in units of the stored input; None: the input is not normalised.
      std: [channels] float32, in units of the stored input; None likewise. Only these two define
        the scale of numbers, not the input's dtype.
      padding: What mini-batches of samples of different lengths are padded to; None: all samples
        are as long as they are stored.
    """

    source: str
    train: Examples
    test: Examples
    classes: int
    mean: NDArray[np.float32] | None = None
    std: NDArray[np.float32] | None = None
    padding: Padding | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the input that flows through the cuts, the longest one."""
        return _sample_shape(self.train.x, self.padding)

    def at_full_length(self, examples: Examples) -> Examples:
        """Returns samples of it padded to the longest length, if they differ in length."""
        return examples if self.padding is None else self.padding.padded(examples)

    def normalise(self, x: Array) -> Array:
        """Returns the network's input of a stored one [samples, …]; see ``normalise``."""
        return normalise(x, self.mean, self.std)

    def signature(self, dtype: str = "float32") -> Signature:
        """Returns shapes and dtypes of a sample as the network receives it.

        Args:
          dtype: Dtype of the computation.
        """
        stored = self.train.x.dtype.name if self.mean is None else "float32"
        return Signature(
            ArrayType(self.input_shape, computed_dtype(stored, dtype)),
            _types(self.train.sides, dtype, self.padding, of_inputs=True),
            _types(self.train.targets, dtype, self.padding, of_inputs=False),
            self.classes,
        )


def fitted(array: Array, length: int, fill: float) -> Array:
    """Returns an array [samples, positions, …] cut or filled up to a number of positions."""
    if array.shape[1] >= length:
        return array[:, :length]
    made = np.full((len(array), length, *array.shape[2:]), fill, array.dtype)
    made[:, : array.shape[1]] = array
    return made


def named(arrays: ArrayOrDict, name: str) -> dict[str, Array]:
    """Returns arrays by name; a single one gets the name given."""
    return dict(arrays) if isinstance(arrays, Mapping) else {name: arrays}


def normalise(x: Array, mean: NDArray[np.float32] | None, std: NDArray[np.float32] | None) -> Array:
    """Returns (x - mean) / std as [samples, …, channels] float32, a new array.

    Without mean and std, numbers with a fraction become float32, and whole ones int32. What is
    stored as float64 stays so, with them and without: ``computed`` rounds it where that is due.
    """
    wide: Any = np.float64 if x.dtype == np.float64 else np.float32
    if mean is None or std is None:
        return x.astype(computed_dtype(x.dtype.name, np.dtype(wide).name), copy=False)
    # One multiplication and one addition in place: half the memory traffic of the formula. Numbers
    # for a whole sample, and not for its channels alone, let numpy work through it in one loop.
    scale, shift = (
        np.ascontiguousarray(np.broadcast_to(one, x.shape[1:] or (1,)))
        for one in (np.ones(1, wide) / std, mean.astype(wide) / std)
    )
    made: Array = np.multiply(x, scale, dtype=wide)
    made -= shift
    return made


def computed(array: Array, floating: DTypeLike) -> Array:
    """Returns an array in the dtype in which it is computed with; see ``computed_dtype``."""
    dtype = np.dtype(floating)
    wanted = computed_dtype(array.dtype.name, dtype.name)
    return np.asarray(array).astype(dtype if wanted == dtype.name else wanted, copy=False)


def _types(
    arrays: Mapping[str, Array], dtype: str, padding: Padding | None, *, of_inputs: bool
) -> dict[str, ArrayType]:
    padded: frozenset[str] = frozenset()
    if padding is not None:
        padded = padding.inputs if of_inputs else padding.targets
    return {
        name: ArrayType(
            _sample_shape(one, padding if name in padded else None),
            computed_dtype(one.dtype.name, dtype),
        )
        for name, one in sorted(arrays.items())
    }


def _sample_shape(array: Array, padding: Padding | None) -> tuple[int, ...]:
    """Returns the shape of a sample, one of positions padded to the longest length."""
    shape = tuple(array.shape[1:])
    return shape if padding is None else (padding.longest, *shape[1:])
