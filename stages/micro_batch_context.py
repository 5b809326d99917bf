"""The scalar inputs of a stage for a micro-batch, and the bits of its noise."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class MicroBatchContext(NamedTuple):
    """Scalars of one micro-batch, as numpy scalars, so that new values do not cause compilation.

    Attributes:
      inverse_batch: 1 / samples of the mini-batch, float32 (float64 under x64).
      seed: Root seed of the run, uint32.
      device: Index of the device that owns the samples, uint32.
      step: Number of the optimiser step on that device, uint32.
      position: Samples of the mini-batch that come before this micro-batch, uint32.
      noise: Random bits [2, micro-batch, …] uint32 for what a private stage sends; else None.
    """

    inverse_batch: np.float32 | np.float64
    seed: np.uint32
    device: np.uint32
    step: np.uint32
    position: np.uint32
    noise: NDArray[np.uint32] | None = None


def make_draw(
    mini_batch: int,
    *,
    seed: int = 0,
    device: int = 0,
    step: int = 0,
    position: int = 0,
    dtype: type[np.float32] | type[np.float64] = np.float32,
) -> MicroBatchContext:
    """Builds the ``MicroBatchContext`` of a micro-batch from plain integers.

    Args:
      mini_batch: Samples of the whole mini-batch.
      seed: Root seed of the run; taken modulo 2**32.
      device: Index of the owning device.
      step: Optimiser step on that device.
      position: Samples of the mini-batch before this micro-batch.
      dtype: Dtype of ``inverse_batch``; that of the weights.
    """
    return MicroBatchContext(
        dtype(1.0 / mini_batch),
        np.uint32(seed % 2**32),
        np.uint32(device),
        np.uint32(step),
        np.uint32(position),
    )


def name_hash(name: str) -> int:
    """A name's hash that is the same in every process (CRC-32)."""
    return zlib.crc32(name.encode())
