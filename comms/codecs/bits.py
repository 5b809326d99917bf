"""The bit-level codec: any number of bits per element, packed with shifts and masks only.

The parameter selects the mode. Elements are coded in blocks of 64, in C order:

===================== ==========================================================================
``bits:K``            an exponent E per block; of each element its sign and K bits (1 to 23), to
                      the nearest, ties to even. No element is off by more than 2^(E - K); 2^E is
                      the power of two at or below the block's largest magnitude, after rounding
``bits:Ks``           the same, rounded at random, up or down by how near either is, so that the
                      mean error is zero; K at most 15. The same array gives the same bytes;
                      ``bits:6s17`` draws with seed 17 (0 to 255)
``bits:abs0.001``     no element is off by more than 0.001; bits as each block needs
``bits:rel0.001``     no element is off by more than 0.001 of the array's largest magnitude
``bits:lossless``     nothing is lost, NaNs' payloads included
===================== ==========================================================================

A payload begins with a head of 8 bytes: flags (u32: 1 raw, 2 sparse, 4 signed) and, with abs and
rel, the exponent of the step (i32). Sections follow, each filled with zeros to a multiple of 8:

- raw: the array's bytes. Taken where nothing is smaller, and with abs and rel where a step would
  not hold the bound: the array has an infinity or a NaN, or needs more than 30 bits;
- sparse: the bitmap of the elements that are not zero, least significant bit first; only those
  make up the blocks (of m in all). Taken where it pays, such as behind a ReLU;
- K: m bytes, the exponent E of each block plus 127; 0 if all of it is sent as zero (nothing
  reaches 2^-100), 255 if it arrives as NaN since it holds a NaN or an infinity. A step is
  2^(E + 1 - K). Then for each block K planes, with the flag "signed" K + 1 (``bit_planes``), of the
  elements' multiples of the step in two's complement;
- abs, rel: m bytes, the width of each block, plus 128 if it has negative elements. Then each
  block's planes, of the multiples of the one step in two's complement;
- lossless: m bytes, each block's least leading byte; m bytes, its width; then each block's planes.
  An element is its bits turned to the left by one, so that the sign is the lowest, less the
  block's leading byte.

The exponent of a block is that of its largest magnitude after rounding. bfloat16 and float16 are
computed with as float32, and so is float64 with K; lossless, abs and rel take each type as it is.
The jit kernels in pipar_jax.codec_kernels.bit_kernels give the same bytes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs.base import register
from comms.codecs.bit_bounded import decode_bounded, encode_bounded
from comms.codecs.bit_fixed import decode_fixed, encode_fixed
from comms.codecs.bit_lossless import decode_lossless, encode_lossless
from comms.codecs.bit_payload import HEAD_BYTES, SLAB, PayloadParts, fixed_bytes
from comms.codecs.bit_settings import Mode, Setting
from comms.codecs.cast import aligned_empty, check_float
from comms.wire.frame import array_bytes


class BitCodec:
    """Sends floating-point arrays in any number of bits, or within a bound."""

    name = "bits"
    code = 7
    default_parameter = 7
    exact_size = False

    def parameter_of(self, text: str) -> int:
        """Parses ``6s``, ``6s17``, ``abs1e-3``, ``rel1e-3`` or ``lossless``."""
        return Setting.parse(text).parameter()

    def precision_bits(self, parameter: int) -> int | None:
        """Returns K plus the sign; None for the other modes."""
        setting = Setting.of(parameter)
        return setting.bits + 1 if setting.bits else None

    def check(self, dtype: DType, parameter: int) -> None:
        """Accepts floating-point dtypes and the parameters of ``Setting``."""
        check_float(self.name, dtype)
        Setting.of(parameter)

    def encoded_bytes(self, dtype: DType, shape: tuple[int, ...], parameter: int) -> int:
        """Returns the maximum size of a payload."""
        setting = Setting.of(parameter)
        count = array_bytes(np.dtype(np.uint8), shape)
        most = count * dtype.itemsize
        if setting.bits:
            most = min(most, fixed_bytes(count, setting.bits + 1))
        return HEAD_BYTES + most

    def check_payload(
        self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> None:
        """Checks head, widths and the sizes of all sections against each other.

        Raises:
          CodecError: If they do not fit the array or each other.
        """
        PayloadParts.of(payload, dtype, shape, parameter)

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns the smallest of the raw, the dense and the sparse form."""
        setting, flat = Setting.of(parameter), array.reshape(-1)
        if setting.mode is Mode.LOSSLESS:
            return encode_lossless(flat)
        if setting.bits:
            return encode_fixed(flat, setting)
        return encode_bounded(flat, setting)

    def decode(self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int) -> Array:
        """Returns each element's multiple of its step.

        Raises:
          CodecError: If the payload is not valid for this codec.
        """
        setting, array = Setting.of(parameter), aligned_empty(dtype, shape)
        parts = PayloadParts.of(payload, dtype, shape, parameter)
        if parts.raw is not None:
            array.reshape(-1).view(np.uint8)[...] = parts.raw
            return array
        if setting.mode is Mode.LOSSLESS:
            values = decode_lossless(parts, dtype)
        else:
            if setting.bits:
                values = decode_fixed(parts, setting.bits)
            else:
                values = decode_bounded(parts, dtype)
            if dtype.itemsize == 2 or parts.step > 0:
                # Rounded up, the largest numbers of a dtype may overflow; NaNs remain NaNs.
                largest = largest_of(dtype)
                np.clip(values, -largest, largest, out=values)
        with np.errstate(over="ignore", invalid="ignore"):
            if parts.present is None:
                array.reshape(-1)[...] = values[: array.size]
            else:
                _spread(values, parts.present, array.reshape(-1))
        return array


def _spread(values: Array, present: Array, flat: Array) -> None:
    """Puts values at the present positions and zeros elsewhere, with little extra memory."""
    flat[...] = 0
    at = 0
    for begin in range(0, flat.size, SLAB):
        here = np.flatnonzero(present[begin : begin + SLAB])
        flat[begin : begin + SLAB][here] = values[at : at + here.size]
        at += here.size


def largest_of(dtype: DType) -> float:
    """Returns the largest finite number of a floating-point type."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


BITS = register(BitCodec())
