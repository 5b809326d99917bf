"""Block-wise codecs: a scale per block of elements, then each element in 8 or 4 bits.

The parameter is the block size b, a multiple of 8. An array of n elements, in C order, makes
m = ceil(n / b) blocks, the last one possibly shorter. Layout::

    4 m bytes   scales, float32 little-endian
    rest        elements: n bytes (int8, fp8, fp8_e5m2), or ceil(n / 2) bytes (int4), where
                byte i holds element 2i + 8 in its low and element 2i+1 + 8 in its high four bits
                (an odd last one is followed by the code of zero)

With t the largest magnitude of a block and q the largest code (127, 7, 448 or 57344), an element
x is sent as round(x * (q / t)), ties to even, and read as code * scale with scale = t * (1 / q),
all in float32. Blocks with t < 2**-100 are sent as zeros with scale 0. A block that holds an
infinity or a NaN gets the scale NaN, so that it arrives as NaN and never as a plausible number.
The jit kernels in pipar_jax.codec_kernels.kernels do the same operations in the same order and so
give the same bytes; that is why scale is a product with 1 / q: compilers turn a division by a
constant into just that.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs.base import no_such_parameter, register
from comms.codecs.cast import aligned_empty, check_float
from comms.errors import CodecError
from comms.wire.buffers import allocate_aligned
from comms.wire.frame import array_bytes

TINY = np.float32(2.0**-100)
"""Blocks whose largest magnitude is below this are sent as zeros."""
MAX_BLOCK = 1 << 16
DEFAULT_BLOCK = 128
_SLAB_ELEMENTS = 1 << 15  # stays in the L2 cache through all passes


class BlockCodec:
    """Sends floating-point arrays as a scale per block and 8- or 4-bit elements.

    Args:
      name: Name of the codec.
      code: Its number on the wire.
      top: The largest code.
      bits: 8 or 4.
      narrow: The 8-bit type of an element, or int8 for four bits.
    """

    default_parameter = DEFAULT_BLOCK
    exact_size = True

    def __init__(self, name: str, code: int, *, top: float, bits: int, narrow: DType) -> None:
        self.name = name
        self.code = code
        self.top = np.float32(top)
        self.bits = bits
        self.narrow = narrow
        self.rounds = narrow == np.int8
        # A look-up is several times faster than the conversions of 8-bit floating-point types.
        self._values = np.arange(256, dtype=np.uint8).view(narrow).astype(np.float32)

    def parameter_of(self, text: str) -> int:
        """Accepts no words."""
        raise no_such_parameter(self.name, text)

    def precision_bits(self, parameter: int) -> int:
        """Returns the bits of an integer, or of a floating-point type's significand and sign."""
        if self.rounds:
            return self.bits
        return int(ml_dtypes.finfo(self.narrow).nmant) + 2  # type: ignore[no-untyped-call]

    def check(self, dtype: DType, parameter: int) -> None:
        """Accepts floating-point dtypes and a block size."""
        check_float(self.name, dtype)
        if not 8 <= parameter <= MAX_BLOCK or parameter % 8:
            raise CodecError(
                f"codec {self.name}: a block has a multiple of 8 elements, 8 to {MAX_BLOCK}, "
                f"got {parameter}"
            )

    def check_payload(
        self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> None:
        """Accepts all: any bytes of the exact size are some array."""

    def encoded_bytes(self, dtype: DType, shape: tuple[int, ...], parameter: int) -> int:
        """Returns the exact size."""
        count = array_bytes(np.dtype(np.uint8), shape)
        return 4 * -(-count // parameter) + -(-count * self.bits // 8)

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns scales and codes of an array."""
        flat = array.reshape(-1)
        blocks = -(-flat.size // parameter)
        payload = allocate_aligned(self.encoded_bytes(array.dtype, array.shape, parameter))
        scales = payload[: 4 * blocks].view(np.float32)
        body = payload[4 * blocks :]
        for begin, end, first in _slabs(flat.size, parameter):
            values = flat[begin:end]
            missing = -(end - begin) % parameter
            if missing:
                values = np.concatenate([values, np.zeros(missing, values.dtype)])
            with np.errstate(over="ignore", invalid="ignore"):
                block = values.astype(np.float32, copy=False).reshape(-1, parameter)
            codes: Array = self._codes(block, scales[first : first + len(block)]).reshape(-1)
            if self.bits == 4:
                codes = (codes[0::2] | (codes[1::2] << 4))[: -(-(end - begin) // 2)]
                body[begin // 2 : begin // 2 + codes.size] = codes
            else:
                body[begin:end] = codes[: end - begin]
        return payload

    def _codes(self, block: Array, scales: Array) -> Array:
        """Returns the codes [k, b] uint8 of k blocks and fills in their scales [k]."""
        top = np.maximum(block.max(axis=1), -block.min(axis=1))
        usable = (top >= TINY) & (top < np.float32(np.inf))
        factor = np.divide(self.top, top, out=np.zeros_like(top), where=usable)
        with np.errstate(invalid="ignore"):
            scaled = block * factor[:, None]
            scales[...] = np.where(usable, top * (np.float32(1) / self.top), np.float32(0))
        if not usable.all():
            scaled[~usable] = 0
            scales[~(top < np.float32(np.inf))] = np.nan
        if self.rounds:
            np.rint(scaled, out=scaled)
        if self.bits == 4:
            scaled += np.float32(8)
            codes: Array = scaled.astype(np.uint8)
        else:
            codes = scaled.astype(self.narrow).view(np.uint8)
        return codes

    def decode(self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int) -> Array:
        """Returns code times scale for each element."""
        array = aligned_empty(dtype, shape)
        flat = array.reshape(-1)
        blocks = -(-flat.size // parameter)
        scales = payload[: 4 * blocks].copy().view(np.float32)
        body = payload[4 * blocks :]
        for begin, end, first in _slabs(flat.size, parameter):
            if self.bits == 4:
                packed = body[begin // 2 : -(-end // 2)]
                codes = np.empty(2 * packed.size, np.float32)
                codes[0::2] = packed & 15
                codes[1::2] = packed >> 4
                codes -= np.float32(8)
                codes = codes[: end - begin]
            else:
                codes = self._values[body[begin:end]]
            whole = (end - begin) // parameter * parameter
            count = whole // parameter
            with np.errstate(over="ignore", invalid="ignore"):
                if whole:
                    product = codes[:whole].reshape(-1, parameter)
                    product *= scales[first : first + count, None]
                if whole < end - begin:
                    codes[whole:] *= scales[first + count]
                flat[begin:end] = codes
        return array


def _slabs(size: int, block: int) -> list[tuple[int, int, int]]:
    """Returns (begin, end, index of the first block) of runs of blocks that fit into the cache."""
    step = max(1, _SLAB_ELEMENTS // block) * block
    return [(at, min(at + step, size), at // block) for at in range(0, size, step)]


register(BlockCodec("fp8", 3, top=448.0, bits=8, narrow=np.dtype(ml_dtypes.float8_e4m3fn)))
register(BlockCodec("int8", 4, top=127.0, bits=8, narrow=np.dtype(np.int8)))
register(BlockCodec("int4", 5, top=7.0, bits=4, narrow=np.dtype(np.int8)))
register(BlockCodec("fp8_e5m2", 6, top=57344.0, bits=8, narrow=np.dtype(ml_dtypes.float8_e5m2)))
