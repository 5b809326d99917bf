"""Shapes and dtypes of a sample: its input, side inputs and targets. numpy only, no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")

#: Name of the input that flows through the cuts; all other inputs are side inputs.
INPUT = "x"
#: Name of the targets where they are a single array.
TARGET = "y"


class ArrayType(NamedTuple):
    """One array of a sample.

    Attributes:
      shape: Its shape, without the samples' axis.
      dtype: numpy's name of its dtype.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes per sample."""
        # numpy knows bfloat16 only where ml_dtypes is loaded.
        itemsize = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * itemsize

    def __str__(self) -> str:
        """Returns a text such as ``float32[8, 8, 1]``."""
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a sample consists of, as a network and its loss receive it.

    Attributes:
      input: The input that flows through the cuts.
      sides: Side inputs (masks, lengths, positions) by name.
      targets: Targets by name; a single array is named ``y``.
      classes: Number of classes, or of outputs per sample; 0 if the data do not determine it.
    """

    input: ArrayType
    sides: Mapping[str, ArrayType] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, ArrayType] = dataclasses.field(default_factory=dict)
    classes: int = 0

    @classmethod
    def labelled(cls, shape: tuple[int, ...], classes: int, dtype: str = "float32") -> Signature:
        """Returns the signature of samples with one label, such as images."""
        label = ArrayType((), "int32")
        return cls(ArrayType(tuple(shape), dtype), {}, {TARGET: label}, classes)

    def __str__(self) -> str:
        """Returns a text for messages."""
        sides = "".join(f", {name} {side}" for name, side in self.sides.items())
        targets = ", ".join(f"{name} {target}" for name, target in self.targets.items())
        return f"{self.input}{sides} with targets {targets or 'unknown'}"


def computed_dtype(dtype: str, floating: str) -> str:
    """Returns the dtype in which arrays of a stored dtype are computed with and sent.

    Whole numbers become int32, numbers of any precision the dtype of the computation, and truth
    values stay.

    Args:
      dtype: numpy's name of the stored dtype.
      floating: The dtype of the computation.
    """
    if dtype == "bool":
        return dtype
    return "int32" if dtype.startswith(("int", "uint")) else floating


def unwrapped(targets: Mapping[str, Item]) -> Item | dict[str, Item]:
    """Returns targets as a loss gets them: a single one named ``y`` alone, others by name."""
    return targets[TARGET] if targets.keys() == {TARGET} else dict(targets)
