"""Which formulation of a layer is used for a shape on a platform.

On GPUs and TPUs it is always XLA's own operation. On CPUs it is the one that was fastest for the
nearest shape in `stages.layers.measured`, a small table that
`python -m stages.layers.measure` writes anew. The choice is a pure function of static shapes,
so it is the same in every process.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import math
from collections.abc import Iterator

import jax

from stages.layers.measured import TABLE

# Kernel size and stride change what is computed, not just how much of it.
WEIGHTS = (0.25, 1.0, 1.0, 1.0, 1.0, 8.0, 8.0)


class Formulation(enum.Enum):
    """An exact way to compute a layer.

    XLA: the compiler's own operation.
    DIRECT: elementwise operations on slices.
    PATCHES: patches of the image times a matrix.
    """

    XLA = "xla"
    DIRECT = "direct"
    PATCHES = "patches"


_forced: contextvars.ContextVar[Formulation | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(formulation: Formulation | None) -> Iterator[None]:
    """Forces one formulation wherever a layer has it, for what is traced inside the block."""
    token = _forced.set(formulation)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(operation: str, shape: tuple[int, ...]) -> Formulation:
    """Picks the formulation of an operation on the current platform.

    Args:
      operation: "conv_forward", "conv_input", "conv_kernel", "depthwise" or "max_pool".
      shape: (batch, height, width, in, out, size, stride) of the operation.
    """
    wanted = _forced.get()
    if wanted is not None:
        return wanted
    if jax.default_backend() != "cpu":
        return Formulation.XLA
    return fastest(operation, shape)


@functools.cache
def fastest(operation: str, shape: tuple[int, ...]) -> Formulation:
    """Looks up what was fastest on a CPU for the measured shape nearest to this one."""

    def distance(row: tuple[tuple[int, ...], dict[str, float]]) -> float:
        pairs = zip(WEIGHTS, row[0], shape, strict=True)
        return sum(weight * abs(math.log2(known / asked)) for weight, known, asked in pairs)

    _, times = min(TABLE[operation], key=distance)
    return Formulation(min(times, key=times.__getitem__))
