"""The bit-level codec with a bound: multiples of a single step, with a width per block."""

from __future__ import annotations

import math

import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs import bit_planes
from comms.codecs.bit_payload import (
    MOST_STEP,
    MOST_WIDTH,
    RAW,
    SPARSE,
    PayloadParts,
    bitmap_of,
    in_blocks,
    pack_payload,
    pack_slabs,
    padded,
    sparse_bytes,
    unpack_slabs,
)
from comms.codecs.bit_planes import BLOCK
from comms.codecs.bit_settings import Mode, Setting


def step_exponent(setting: Setting, largest: float, dtype: DType) -> int:
    """Returns j such that rounding to multiples of 2^j keeps the bound.

    An element's error is half a step, and where the step's multiple does not fit a narrow type as
    much again, since it is then rounded to a number no farther away than the element itself.

    Args:
      setting: A setting of mode abs or rel.
      largest: The array's largest magnitude, finite.
      dtype: The array's type.
    """
    if setting.mode is Mode.ABSOLUTE:
        exponent = math.frexp(setting.bound)[1] - 1
    elif largest == 0:
        return 0
    else:
        # Whole numbers: floor(log2(bound * largest)) without intermediate rounding.
        (bound, first), (most, second) = math.frexp(setting.bound), math.frexp(largest)
        product = int(bound * 2**53) * int(most * 2**53)
        exponent = first + second - (2 if product < 1 << 105 else 1)
    return exponent + (dtype.itemsize >= 4)


def encode_bounded(flat: Array, setting: Setting) -> Bytes:
    """Returns the payload of values [n], each within the bound."""
    kind = np.float64 if flat.dtype == np.float64 else np.float32
    values = flat.astype(kind, copy=False)
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    relative = setting.mode is Mode.RELATIVE
    if not math.isfinite(largest) or (relative and 0 < largest < 2.0**-60):
        return pack_payload(RAW, flat)
    step = step_exponent(setting, largest, flat.dtype)
    if math.frexp(largest)[1] - step >= MOST_WIDTH or step > MOST_STEP:
        return pack_payload(RAW, flat)
    whole = np.rint(np.multiply(values, 2.0**-step)).astype(np.int32)
    present = whole != 0
    kept = int(np.count_nonzero(present))
    raw = flat.nbytes
    dense_marks = _widths(whole)
    dense = padded(dense_marks.size) + 8 * int((dense_marks & 127).sum(dtype=np.int64))
    packed = whole[np.flatnonzero(present)] if 8 * (whole.size - kept) > whole.size else whole
    sparse_marks = _widths(packed) if packed is not whole else dense_marks
    sparse = sparse_bytes(whole.size) + padded(sparse_marks.size)
    sparse += 8 * int((sparse_marks & 127).sum(dtype=np.int64))
    if raw <= min(dense, sparse):
        return pack_payload(RAW, flat)
    if sparse < dense:
        planes = pack_slabs(in_blocks(packed).reshape(-1).view(np.uint32), sparse_marks & 127)
        return pack_payload(SPARSE, bitmap_of(present), sparse_marks, *planes, step=step)
    planes = pack_slabs(in_blocks(whole).reshape(-1).view(np.uint32), dense_marks & 127)
    return pack_payload(0, dense_marks, *planes, step=step)


def _widths(whole: Array) -> Bytes:
    """Returns the width of each block of whole numbers [n] int32, plus 128 if any is negative."""
    blocks = in_blocks(whole)
    negative = blocks.min(axis=1) < 0
    top = (blocks ^ (blocks >> 31)).max(axis=1).view(np.uint32)
    marks: Bytes = bit_planes.bit_length(top) + negative * np.uint8(129)
    return marks


def decode_bounded(parts: PayloadParts, dtype: DType) -> Array:
    """Returns the values of all blocks, [64 m] float32 or float64."""
    widths, signed = parts.first & 127, parts.first > 127
    words = unpack_slabs(parts.planes, widths, 4).view(np.int32).reshape(-1, BLOCK)
    # The highest bit of a block with negative elements is a sign bit.
    sign = np.where(signed, np.int32(1) << (widths.astype(np.int32) - 1), 0)[:, None]
    words ^= sign
    words -= sign
    values: Array = words.reshape(-1).astype(np.float64 if dtype == np.float64 else np.float32)
    with np.errstate(over="ignore"):
        np.multiply(values, 2.0**parts.step, out=values)
    return values
