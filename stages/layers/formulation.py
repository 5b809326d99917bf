"""Which formulation of a layer is used for a shape on a platform.

On GPUs and TPUs it is always XLA's own operation. On CPUs it is the one that was fastest for this
shape in ``measured.csv``, a table of all shapes of the registered networks that ``python -m
experiments.benchmarks.layer_formulations`` writes anew. For a shape that is not in it, it is the
one that was fastest for the nearest shape of its kind, and never XLA's where that is a naive loop.
The choice is a pure function of static shapes, so it is the same in every process.
"""

from __future__ import annotations

import contextlib
import contextvars
import csv
import enum
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax

TABLE = Path(__file__).with_name("measured.csv")


class Formulation(enum.Enum):
    """An exact way to compute a layer.

    XLA: the compiler's own operation.
    DIRECT: elementwise operations on slices.
    PATCHES: patches of the image times a matrix.
    """

    XLA = "xla"
    DIRECT = "direct"
    PATCHES = "patches"


class LayerShape(NamedTuple):
    """Static shape of a square convolution or of pooling.

    Attributes:
      batch: Number of samples.
      height: Rows of the input.
      width: Columns of the input.
      features: Channels of the input.
      out: Channels of the output.
      size: Height and width of the window.
      stride: Step of the window in both directions.
      padding: Pixels added on each side.
    """

    batch: int
    height: int
    width: int
    features: int
    out: int
    size: int
    stride: int
    padding: int

    def slid(self, length: int) -> int:
        """Places of the window along an axis of ``length``."""
        return (length + 2 * self.padding - self.size) // self.stride + 1


# Measurements of an operation: milliseconds by formulation, by batch, by the rest of the shape.
Times: TypeAlias = dict[str, float]
Rows: TypeAlias = dict[tuple[int, ...], dict[int, Times]]

_forced: contextvars.ContextVar[Formulation | None] = contextvars.ContextVar("forced", default=None)
_asked: contextvars.ContextVar[set[tuple[str, LayerShape]] | None]
_asked = contextvars.ContextVar("asked", default=None)


@contextlib.contextmanager
def forced(formulation: Formulation | None) -> Iterator[None]:
    """Forces a formulation for layers that have it and are traced inside the block."""
    token = _forced.set(formulation)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[set[tuple[str, LayerShape]]]:
    """Yields a set that the operations and shapes traced inside the block are added to."""
    asked: set[tuple[str, LayerShape]] = set()
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def has_choice() -> bool:
    """Returns whether layers have other formulations than XLA's on the current platform."""
    wanted = _forced.get()
    if wanted is None:
        return jax.default_backend() == "cpu"
    return wanted is not Formulation.XLA


def choose(operation: str, shape: LayerShape) -> Formulation:
    """Picks the formulation of an operation on the current platform.

    Args:
      operation: "conv_forward", "conv_input", "conv_kernel", "depthwise" or "max_pool".
      shape: Shape of the operation.
    """
    asked = _asked.get()
    if asked is not None:
        asked.add((operation, shape))
    wanted = _forced.get()
    if wanted is not None:
        return wanted
    if jax.default_backend() != "cpu":
        return Formulation.XLA
    return fastest(operation, shape)


@functools.cache
def fastest(operation: str, shape: LayerShape) -> Formulation:
    """Returns the fastest formulation on a CPU for this shape, or for the nearest measured shape.

    Among several batches of a shape the nearest is used.
    """
    rows = table()[operation]
    row: tuple[int, ...] = shape[1:]
    if row not in rows:
        if is_naive(operation, shape):
            return Formulation.PATCHES
        known = [row for row in rows if not is_naive(operation, LayerShape(1, *row))]
        row = min(known, key=lambda row: _distance(LayerShape(1, *row), shape))
    batches = rows[row]
    times = batches[min(batches, key=lambda batch: abs(math.log2(batch / shape.batch)))]
    return Formulation(min(times, key=times.__getitem__))


def is_naive(operation: str, shape: LayerShape) -> bool:
    """Whether XLA computes a pass of a convolution in a naive loop, up to a hundred times slower.

    XLA lets kernel and image change places where the kernel has more pixels than the image, which
    saves operations; but nothing fast takes what comes out. The image is the input in the forward
    pass and the output's cotangent in the input's; in the kernel's it is the input, and the
    cotangent is the kernel. A map of one pixel is a matrix product instead.
    """
    if not operation.startswith("conv_"):
        return False
    pixels, window = shape.height * shape.width, shape.size**2
    slid = shape.slid(shape.height) * shape.slid(shape.width)
    if operation == "conv_kernel":
        return slid > pixels
    if operation == "conv_input" and shape.size == shape.stride == 2:
        # Over a single row XLA's compiler even ends the process, whatever the row's length.
        slid = 1 if min(shape.height, shape.width) == 1 else slid
    return pixels > 1 and window > (pixels if operation == "conv_forward" else slid)


@functools.cache
def table() -> dict[str, Rows]:
    """Reads the measurements by operation."""
    tables: dict[str, Rows] = {}
    names = [formulation.value for formulation in Formulation]
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            shape = LayerShape(*(int(row[field]) for field in LayerShape._fields))
            times = {name: float(row[name]) for name in names if row[name]}
            batches = tables.setdefault(row["operation"], {}).setdefault(shape[1:], {})
            batches[shape.batch] = times
    return tables


def _distance(known: LayerShape, asked: LayerShape) -> tuple[int, float]:
    """Returns the distance of a shape from a measured one: by kind, then by size."""
    kinds = zip(_kind(known), _kind(asked), strict=True)
    # Neither the batch, of which a shape has several, nor the padding, which the window sets.
    pairs = zip(known[1:7], asked[1:7], strict=True)
    return sum(a != b for a, b in kinds), sum(abs(math.log2(a / b)) for a, b in pairs)


def _kind(shape: LayerShape) -> tuple[bool, ...]:
    """Returns the properties of a shape that affect the algorithm, not only the amount of work."""
    return shape.height * shape.width == 1, shape.size == 1, shape.stride == 1
