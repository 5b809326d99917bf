"""Codecs that narrow each element on its own: bfloat16 and float16.

Layout: n elements of 2 bytes, little-endian, in C order. Rounding is to the nearest, ties to even;
numbers beyond float16 become infinite.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs.base import no_such_parameter, register
from comms.errors import CodecError
from comms.wire.buffers import allocate_aligned
from comms.wire.frame import array_bytes

FLOATS = frozenset(
    np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
)
"""Element types that the lossy codecs support."""


class CastCodec:
    """Sends floating-point arrays in a narrower type.

    Args:
      name: Name of the codec.
      code: Its number on the wire.
      narrow: The dtype on the wire.
    """

    default_parameter = 0
    exact_size = True

    def __init__(self, name: str, code: int, narrow: DType) -> None:
        self.name = name
        self.code = code
        self.narrow = narrow

    def parameter_of(self, text: str) -> int:
        """Accepts no words."""
        raise no_such_parameter(self.name, text)

    def precision_bits(self, parameter: int) -> int:
        """Returns the bits of the significand and the sign."""
        return int(ml_dtypes.finfo(self.narrow).nmant) + 2  # type: ignore[no-untyped-call]

    def check(self, dtype: DType, parameter: int) -> None:
        """Accepts floating-point dtypes and no parameter."""
        check_float(self.name, dtype)
        if parameter != 0:
            raise CodecError(f"codec {self.name} takes no parameter, got {parameter}")

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns the narrowed elements as bytes."""
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(self.narrow).reshape(-1).view(np.uint8)

    def decode(self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int) -> Array:
        """Returns the elements in their original dtype."""
        narrow = payload.view(self.narrow)
        array = aligned_empty(dtype, shape)
        with np.errstate(over="ignore", invalid="ignore"):
            array.reshape(-1)[...] = narrow
        return array

    def check_payload(
        self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> None:
        """Accepts all: any bytes of the exact size are some array."""

    def encoded_bytes(self, dtype: DType, shape: tuple[int, ...], parameter: int) -> int:
        """Returns the exact size."""
        return array_bytes(self.narrow, shape)


def check_float(name: str, dtype: DType) -> None:
    """Raises CodecError unless lossy codecs support the element type."""
    if dtype not in FLOATS:
        raise CodecError(
            f"codec {name} supports float64, float32, float16 and bfloat16, not {dtype}; send it "
            "raw"
        )


def aligned_empty(dtype: DType, shape: tuple[int, ...]) -> Array:
    """Returns an uninitialised array at a 64-byte boundary, so that jax need not copy it."""
    return allocate_aligned(array_bytes(dtype, shape)).view(dtype).reshape(shape)


register(CastCodec("bfloat16", 1, np.dtype(ml_dtypes.bfloat16)))
register(CastCodec("float16", 2, np.dtype(np.float16)))
