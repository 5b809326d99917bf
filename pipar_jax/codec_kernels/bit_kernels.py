"""The bit-level codec of comms as pure functions under jit, with identical bytes.

The size of a payload depends on the array: ``encode`` returns the maximum number of bytes, and the
actual size. Layout and rounding are those of comms.codecs.bits. Comparisons use the bits, since
accelerators flush the smallest numbers to zero and numpy does not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from comms.arrays import DType
from comms.codecs.bit_bounded import step_exponent
from comms.codecs.bit_fixed import NAN_EXPONENT, TINY_EXPONENT
from comms.codecs.bit_payload import (
    HEAD_BYTES,
    MOST_STEP,
    MOST_WIDTH,
    RAW,
    SIGNED,
    SPARSE,
    fixed_bytes,
    padded,
    sparse_bytes,
)
from comms.codecs.bit_planes import BLOCK
from comms.codecs.bit_settings import Mode, Setting
from comms.codecs.bits import largest_of


class _Blocks(NamedTuple):
    """The blocks of an array: words, and the bytes that describe them.

    Attributes:
      words: [m, 64] uint32.
      widths: [m] int32, 0 for blocks after the last element.
      first: [m] uint8.
      second: [m] uint8; only for lossless, else None.
    """

    words: jax.Array
    widths: jax.Array
    first: jax.Array
    second: jax.Array | None = None


def encode(array: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Encodes an array.

    Args:
      array: Any shape, float32, float16 or bfloat16.
      setting: The parsed parameter of the codec.

    Returns:
      The payload, [most] uint8, and its length, a scalar int32; bytes beyond the length have no
      meaning.
    """
    flat, dtype = array.reshape(-1), np.dtype(array.dtype)
    raw = to_bytes(flat)
    if not flat.size:
        return _head(RAW, 0), jnp.int32(HEAD_BYTES)
    if setting.mode is Mode.LOSSLESS:
        return _choose(raw, _turned(flat), lambda x, count: _leading(x, count, dtype))
    if setting.bits:
        return _encode_fixed(flat.astype(jnp.float32), raw, setting)
    return _encode_bounded(flat.astype(jnp.float32), raw, setting, dtype)


def decode(payload: jax.Array, setting: Setting, dtype: DType, shape: tuple[int, ...]) -> jax.Array:
    """Decodes a payload that ``comms.codecs.bit_payload.PayloadParts`` has checked.

    Args:
      payload: [most] uint8, as returned by ``encode``.
      setting: The parsed parameter of the codec.
      dtype: Element type before encoding.
      shape: Shape before encoding.
    """
    size = math.prod(shape)
    if not size:
        return jnp.zeros(shape, dtype)
    lossless, blocks = setting.mode is Mode.LOSSLESS, -(-size // BLOCK)
    flags = from_bytes(payload[:4], np.dtype(np.uint32))[0]
    sparse = (flags & SPARSE) != 0
    # Nothing is read beyond the end: the maximum of a section starts at or before its actual end.
    data = jnp.pad(payload, (0, sparse_bytes(size) + 3 * padded(blocks)))
    bitmap = data[HEAD_BYTES : HEAD_BYTES + -(-size // 8)]
    present = ((bitmap[:, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1).reshape(-1)[:size] != 0
    present |= ~sparse
    count = jnp.sum(present, dtype=jnp.int32)
    used = -(-count // BLOCK)
    at = HEAD_BYTES + jnp.where(sparse, sparse_bytes(size), 0)
    in_use = jnp.arange(blocks) < used
    first = jnp.where(in_use, jax.lax.dynamic_slice(data, (at,), (blocks,)), 0)
    at += _padded(used)
    if lossless:
        widths = jax.lax.dynamic_slice(data, (at,), (blocks,)).astype(jnp.int32)
        at += _padded(used)
    elif setting.bits:
        widths = jnp.full(blocks, setting.bits) + ((flags & SIGNED) != 0)
    else:
        widths = (first & 127).astype(jnp.int32)
    widths = jnp.where(in_use, widths, 0)
    words = _unpack(data, at, widths, _most_width(setting, dtype))
    if lossless:
        kind = jnp.uint16 if dtype.itemsize == 2 else jnp.uint32
        bits = 8 * dtype.itemsize
        words = words.astype(kind) + (first.astype(kind) << (bits - 8))[:, None]
        values = jax.lax.bitcast_convert_type((words >> 1) | (words << (bits - 1)), dtype)
        values = values.reshape(-1)
    else:
        values = _multiplied(words, widths, first, setting, flags, payload).reshape(-1)
        largest = np.float32(largest_of(dtype))
        values = jnp.clip(values, -largest, largest).astype(dtype)
    order = jnp.clip(jnp.cumsum(present, dtype=jnp.int32) - 1, 0)
    spread = jax.lax.cond(
        sparse,
        lambda: jnp.where(present, values[order], jnp.zeros((), dtype)),
        lambda: values[:size],
    )
    as_raw = payload[HEAD_BYTES:]
    as_raw = jnp.pad(as_raw, (0, max(0, size * dtype.itemsize - as_raw.size)))
    as_raw = from_bytes(as_raw[: size * dtype.itemsize], dtype)
    return jnp.where((flags & RAW) != 0, as_raw, spread).reshape(shape)


def to_bytes(array: jax.Array) -> jax.Array:
    """Returns the bytes of an array, [n] uint8, in C order and little-endian."""
    flat = array.reshape(-1)
    if flat.dtype == jnp.bool_:
        return flat.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(flat, jnp.uint8).reshape(-1)


def from_bytes(payload: jax.Array, dtype: DType) -> jax.Array:
    """Returns the array [n] whose bytes these are; the inverse of ``to_bytes``."""
    if dtype == np.bool_:
        return payload.astype(jnp.bool_)
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(payload, dtype)
    return jax.lax.bitcast_convert_type(payload.reshape(-1, dtype.itemsize), dtype)


# --- an exponent per block --------------------------------------------------------------------


def _encode_fixed(
    values: jax.Array, raw: jax.Array, setting: Setting
) -> tuple[jax.Array, jax.Array]:
    size, k = values.size, setting.bits
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    signed = jnp.min(bits) < 0
    present = (bits << 1) != 0
    kept = jnp.sum(present, dtype=jnp.int32)
    width = k + signed.astype(jnp.int32)
    dense = _fixed_bytes(jnp.int32(size), width)
    sparse = sparse_bytes(size) + _fixed_bytes(kept, width)
    is_sparse = sparse < dense
    bits = jax.lax.cond(is_sparse, lambda: _compact(bits, present), lambda: bits)
    count = jnp.where(is_sparse, kept, size)
    blocks = _padded_blocks(bits)
    in_use = jnp.arange(len(blocks)) * BLOCK < count
    top = jnp.max(blocks & 0x7FFFFFFF, axis=1)
    up = 1 << (23 - k) if setting.mode is Mode.NEAREST else (1 << (24 - k)) - 1
    exponent = jnp.minimum((top + up) >> 23, 254)
    unusable, infinite = top < TINY_EXPONENT << 23, top >= 255 << 23
    factor = _power(k - 1 - (exponent - 127) + (k == 1))
    real = jax.lax.bitcast_convert_type(blocks, jnp.float32)
    if k == 1:
        # Multiplying the factors first would not give a normal number.
        real = jax.lax.optimization_barrier(real * np.float32(0.5))  # type: ignore[no-untyped-call]
    scaled = jnp.where((unusable | infinite)[:, None], 0, real * factor[:, None])
    if setting.mode is Mode.STOCHASTIC:
        unsigned = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        mixed = jax.lax.reduce(unsigned, np.uint32(0), jax.lax.bitwise_xor, (0,))
        scaled = jnp.floor(scaled + _draws(blocks.size, mixed + np.uint32(setting.seed), scaled))
    else:
        scaled = jnp.rint(scaled)
    scaled = jnp.clip(scaled, 1 - (1 << k), (1 << k) - 1)
    first = jnp.where(infinite, NAN_EXPONENT, jnp.where(unusable, 0, exponent))
    made = _Blocks(
        jax.lax.bitcast_convert_type(scaled.astype(jnp.int32), jnp.uint32),
        jnp.where(in_use, width, 0),
        jnp.where(in_use, first, 0).astype(jnp.uint8),
    )
    flags = signed * np.uint32(SIGNED) + is_sparse * np.uint32(SPARSE)
    is_raw = raw.size <= jnp.minimum(dense, sparse)
    most = min(raw.size, fixed_bytes(size, k + 1))
    return _assemble(raw, is_raw, flags, jnp.int32(0), present, made, k + 1, most)


def _draws(count: int, seed: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the result of ``comms.codecs.bit_fixed.draws`` for a whole array."""
    h = jnp.arange(count // 4, dtype=jnp.uint32) * np.uint32(0x9E3779B9)
    h += seed * np.uint32(0x85EBCA6B)
    h ^= h >> 16
    h *= np.uint32(0x7FEB352D)
    h ^= h >> 15
    h *= np.uint32(0x846CA68B)
    h ^= h >> 16
    drawn = (to_bytes(h).astype(jnp.float32) + np.float32(0.5)) * np.float32(1 / 256)
    return drawn.reshape(like.shape)


# --- a bound, and without loss ----------------------------------------------------------------


def _encode_bounded(
    values: jax.Array, raw: jax.Array, setting: Setting, dtype: DType
) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    top = jnp.max(bits & 0x7FFFFFFF)
    is_raw = top >= 255 << 23
    if setting.mode is Mode.RELATIVE:
        is_raw |= (top > 0) & (top < (127 - 60) << 23)
        # floor(log2(bound * largest)), from whole numbers of 8 and 24 bits.
        mantissa, exponent = math.frexp(setting.bound)
        bound = np.uint32(int(mantissa * 256))
        largest = ((top & 0x7FFFFF) | 0x800000).astype(jnp.uint32)
        step = exponent - 1 + (top >> 23) - 127 + ((bound * largest) >= np.uint32(1 << 31))
        step = jnp.where(top == 0, 0, step + (dtype.itemsize >= 4))
    else:
        step = jnp.int32(step_exponent(setting, 1.0, dtype))
    is_raw |= (top > 0) & ((top >> 23) - 126 - step >= MOST_WIDTH) | (step > MOST_STEP)
    safe = jnp.where(is_raw, 0, step)
    whole = jnp.rint(jnp.where(is_raw, 0, values) * _power(-safe)).astype(jnp.int32)
    return _choose(raw, whole, _marked, is_raw, step)


def _marked(whole: jax.Array, count: jax.Array) -> _Blocks:
    """Returns the blocks of whole numbers [n] int32, of which ``count`` are valid."""
    blocks = _padded_blocks(whole)
    negative = jnp.min(blocks, axis=1) < 0
    width = 32 - jax.lax.clz(jnp.max(blocks ^ (blocks >> 31), axis=1)) + negative
    words = jax.lax.bitcast_convert_type(blocks, jnp.uint32)
    return _Blocks(words, width, (width + negative * 128).astype(jnp.uint8))


def _turned(flat: jax.Array) -> jax.Array:
    """Returns an array's bits [n] uint32, rotated left by one within their dtype."""
    bits = 8 * flat.dtype.itemsize
    words = jax.lax.bitcast_convert_type(flat, jnp.uint16 if bits == 16 else jnp.uint32)
    return ((words << 1) | (words >> (bits - 1))).astype(jnp.uint32)


def _leading(words: jax.Array, count: jax.Array, dtype: DType) -> _Blocks:
    """Returns the blocks of words, less each block's least leading byte."""
    shift = 8 * dtype.itemsize - 8
    at = jnp.arange(-(-words.size // BLOCK) * BLOCK).reshape(-1, BLOCK)
    blocks = _padded_blocks(words)
    # The last block is padded with words that change neither.
    blocks = jnp.where(at < count, blocks, words[jnp.maximum(count - 1, 0)])
    leading = jnp.where(at[:, 0] < count, jnp.min(blocks, axis=1) >> shift, 0)
    rests = jnp.where((at[:, 0] < count)[:, None], blocks - (leading << shift)[:, None], 0)
    widths = (32 - jax.lax.clz(jnp.max(rests, axis=1))).astype(jnp.int32)
    return _Blocks(rests, widths, leading.astype(jnp.uint8), widths.astype(jnp.uint8))


def _choose(
    raw: jax.Array,
    words: jax.Array,
    make: Any,
    is_raw: jax.Array | bool = False,
    step: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest form of words whose blocks have individual widths.

    Args:
      raw: The array's bytes.
      words: [n]; zeros may be left out.
      make: Creates ``_Blocks`` from words and their number.
      is_raw: Whether only raw is possible.
      step: The step in the head.
    """
    size = words.size
    present = words != 0
    kept = jnp.sum(present, dtype=jnp.int32)
    compact = jax.lax.cond(
        8 * (size - kept) > size, lambda: _compact(words, present), lambda: words
    )
    tried = jnp.where(8 * (size - kept) > size, kept, size)
    dense_blocks, sparse_blocks = make(words, jnp.int32(size)), make(compact, tried)
    dense = _varied_bytes(dense_blocks, jnp.int32(size))
    sparse = sparse_bytes(size) + _varied_bytes(sparse_blocks, tried)
    is_sparse = sparse < dense
    made = jax.tree.map(
        lambda one, other: jnp.where(is_sparse, one, other), sparse_blocks, dense_blocks
    )
    is_raw |= raw.size <= jnp.minimum(dense, sparse)
    most_width = MOST_WIDTH if dense_blocks.second is None else 8 * (raw.size // size)
    flags = is_sparse * np.uint32(SPARSE)
    return _assemble(raw, is_raw, flags, jnp.asarray(step), present, made, most_width, raw.size)


# --- sections ---------------------------------------------------------------------------------


def _assemble(
    raw: jax.Array,
    is_raw: jax.Array,
    flags: jax.Array,
    step: jax.Array,
    present: jax.Array,
    made: _Blocks,
    most_width: int,
    most: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns head and sections, and their size in bytes.

    Sections are written in order, each with its maximum size, over the unused rest of the one
    before.
    """
    blocks, size = len(made.words), present.size
    is_sparse = (flags & SPARSE) != 0
    used = jnp.where(is_sparse, -(-jnp.sum(present, dtype=jnp.int32) // BLOCK), blocks)
    bitmap = jnp.pad(present, (0, -size % 8)).reshape(-1, 8).astype(jnp.uint8)
    bitmap = jnp.sum(bitmap << jnp.arange(8, dtype=jnp.uint8), axis=1, dtype=jnp.uint8)
    planes = _pack(made.words, made.widths, most_width)
    sections = [(bitmap, jnp.where(is_sparse, sparse_bytes(size), 0)), (made.first, _padded(used))]
    if made.second is not None:
        sections.append((made.second, _padded(used)))
    sections.append((planes, 8 * jnp.sum(made.widths)))
    room = HEAD_BYTES + sum(padded(section.size) for section, _ in sections)
    payload = jnp.zeros(max(room, HEAD_BYTES + most), jnp.uint8)
    length = jnp.int32(HEAD_BYTES)
    for section, nbytes in sections:
        section = jnp.pad(section, (0, -section.size % 8))
        payload = jax.lax.dynamic_update_slice(payload, section, (length,))
        length += nbytes
    payload = payload[: HEAD_BYTES + most]
    as_raw = jnp.pad(raw[:most], (HEAD_BYTES, max(0, most - raw.size)))
    payload = jnp.where(is_raw, as_raw, payload)
    head = _head(jnp.where(is_raw, np.uint32(RAW), flags), jnp.where(is_raw, 0, step))
    payload = payload.at[:HEAD_BYTES].set(head)
    return payload, jnp.where(is_raw, HEAD_BYTES + raw.size, length).astype(jnp.int32)


def _head(flags: jax.Array | int, step: jax.Array | int) -> jax.Array:
    both = jnp.stack([jnp.asarray(flags, jnp.uint32), jnp.asarray(step, jnp.int32).view("uint32")])
    return to_bytes(both)


def _pack(words: jax.Array, widths: jax.Array, most: int) -> jax.Array:
    """Returns the concatenated planes of blocks, [m * most * 8] uint8."""
    blocks = len(words)
    ones = words.reshape(blocks, 1, 8, 8) >> jnp.arange(most, dtype=jnp.uint32)[:, None, None]
    ones = (ones & 1) << jnp.arange(8, dtype=jnp.uint32)
    planes = jnp.sum(ones, axis=-1, dtype=jnp.uint32).astype(jnp.uint8)
    to, there = _rows(widths, most)
    to = jnp.where(there, to, blocks * most)  # out of bounds: dropped
    packed = jnp.zeros((blocks * most, 8), jnp.uint8).at[to].set(planes, mode="drop")
    return packed.reshape(-1)


def _unpack(data: jax.Array, at: jax.Array, widths: jax.Array, most: int) -> jax.Array:
    """Returns the words [m, 64] uint32 of the planes from a byte of a payload."""
    rows, there = _rows(widths, most)
    whole = data[: data.size // 8 * 8].reshape(-1, 8)  # sections start at multiples of 8
    planes = jnp.where(there[..., None], whole[jnp.clip(at // 8 + rows, 0, len(whole) - 1)], 0)
    ones = (planes[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    ones = ones.reshape(len(widths), most, BLOCK).astype(jnp.uint32)
    return jnp.sum(ones << jnp.arange(most, dtype=jnp.uint32)[:, None], axis=1, dtype=jnp.uint32)


def _rows(widths: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of each block's planes, [m, most], and which of them exist."""
    ends = jnp.cumsum(widths)
    planes = jnp.arange(most)
    return (ends - widths)[:, None] + planes, planes[None, :] < widths[:, None]


def _multiplied(
    words: jax.Array,
    widths: jax.Array,
    first: jax.Array,
    setting: Setting,
    flags: jax.Array,
    payload: jax.Array,
) -> jax.Array:
    """Returns float32 [m, 64]: words in two's complement times their blocks' steps."""
    if setting.bits:
        signed = jnp.full(len(words), (flags & SIGNED) != 0)
        exponent = first.astype(jnp.int32) + 1 - 127 - setting.bits
        scale = jnp.where(first == 0, 0, _power(exponent))
        scale = jnp.where(first == NAN_EXPONENT, jnp.nan, scale)
    else:
        signed = first > 127
        step = from_bytes(payload[4:8], np.dtype(np.int32))[0]
        scale = jnp.full(len(words), _power(step))
    sign = jnp.where(signed & (widths > 0), 1 << jnp.maximum(widths - 1, 0), 0)[:, None]
    whole = jax.lax.bitcast_convert_type(words, jnp.int32)
    return ((whole ^ sign) - sign).astype(jnp.float32) * scale[:, None]


def _most_width(setting: Setting, dtype: DType) -> int:
    if setting.mode is Mode.LOSSLESS:
        return 8 * dtype.itemsize
    return setting.bits + 1 if setting.bits else MOST_WIDTH


def _power(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent as float32, clipped to the exponents of normal numbers."""
    biased = jnp.clip(exponent + 127, 1, 254).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def _compact(values: jax.Array, present: jax.Array) -> jax.Array:
    """Returns the present values, followed by zeros."""
    to = jnp.where(present, jnp.cumsum(present, dtype=jnp.int32) - 1, values.size)
    return jnp.zeros_like(values).at[to].set(values, mode="drop")


def _padded_blocks(values: jax.Array) -> jax.Array:
    return jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def _padded(nbytes: jax.Array) -> jax.Array:
    return -(-nbytes // 8) * 8


def _fixed_bytes(count: jax.Array, width: jax.Array) -> jax.Array:
    blocks = -(-count // BLOCK)
    return _padded(blocks) + 8 * blocks * width


def _varied_bytes(made: _Blocks, count: jax.Array) -> jax.Array:
    bytes_each = 1 if made.second is None else 2
    return bytes_each * _padded(-(-count // BLOCK)) + 8 * jnp.sum(made.widths)
