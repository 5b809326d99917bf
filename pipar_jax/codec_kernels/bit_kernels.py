"""The bit-level codec of comms as pure functions under jit, with identical bytes.

The size of a payload depends on the array: ``encode`` returns the maximum number of bytes, and the
actual size. Layout and rounding are those of comms.codecs.bits. Comparisons use the bits, since
accelerators flush the smallest numbers to zero and numpy does not.
"""

from __future__ import annotations

import math
from typing import Any

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
from pipar_jax.codec_kernels.bit_sections import (
    Blocks,
    assemble,
    compact_values,
    fixed_section_bytes,
    from_bytes,
    largest_width,
    make_head,
    multiplied,
    padded_blocks,
    padded_length,
    power,
    to_bytes,
    unpack,
    varied_section_bytes,
)


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
        return make_head(RAW, 0), jnp.int32(HEAD_BYTES)
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
    at += padded_length(used)
    if lossless:
        widths = jax.lax.dynamic_slice(data, (at,), (blocks,)).astype(jnp.int32)
        at += padded_length(used)
    elif setting.bits:
        widths = jnp.full(blocks, setting.bits) + ((flags & SIGNED) != 0)
    else:
        widths = (first & 127).astype(jnp.int32)
    widths = jnp.where(in_use, widths, 0)
    words = unpack(data, at, widths, largest_width(setting, dtype))
    if lossless:
        kind = jnp.uint16 if dtype.itemsize == 2 else jnp.uint32
        bits = 8 * dtype.itemsize
        words = words.astype(kind) + (first.astype(kind) << (bits - 8))[:, None]
        values = jax.lax.bitcast_convert_type((words >> 1) | (words << (bits - 1)), dtype)
        values = values.reshape(-1)
    else:
        values = multiplied(words, widths, first, setting, flags, payload).reshape(-1)
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
    dense = fixed_section_bytes(jnp.int32(size), width)
    sparse = sparse_bytes(size) + fixed_section_bytes(kept, width)
    is_sparse = sparse < dense
    bits = jax.lax.cond(is_sparse, lambda: compact_values(bits, present), lambda: bits)
    count = jnp.where(is_sparse, kept, size)
    blocks = padded_blocks(bits)
    in_use = jnp.arange(len(blocks)) * BLOCK < count
    top = jnp.max(blocks & 0x7FFFFFFF, axis=1)
    up = 1 << (23 - k) if setting.mode is Mode.NEAREST else (1 << (24 - k)) - 1
    exponent = jnp.minimum((top + up) >> 23, 254)
    unusable, infinite = top < TINY_EXPONENT << 23, top >= 255 << 23
    factor = power(k - 1 - (exponent - 127) + (k == 1))
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
    made = Blocks(
        jax.lax.bitcast_convert_type(scaled.astype(jnp.int32), jnp.uint32),
        jnp.where(in_use, width, 0),
        jnp.where(in_use, first, 0).astype(jnp.uint8),
    )
    flags = signed * np.uint32(SIGNED) + is_sparse * np.uint32(SPARSE)
    is_raw = raw.size <= jnp.minimum(dense, sparse)
    most = min(raw.size, fixed_bytes(size, k + 1))
    return assemble(raw, is_raw, flags, jnp.int32(0), present, made, k + 1, most)


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
    whole = jnp.rint(jnp.where(is_raw, 0, values) * power(-safe)).astype(jnp.int32)
    return _choose(raw, whole, _marked, is_raw, step)


def _marked(whole: jax.Array, count: jax.Array) -> Blocks:
    """Returns the blocks of whole numbers [n] int32, of which ``count`` are valid."""
    blocks = padded_blocks(whole)
    negative = jnp.min(blocks, axis=1) < 0
    width = 32 - jax.lax.clz(jnp.max(blocks ^ (blocks >> 31), axis=1)) + negative
    words = jax.lax.bitcast_convert_type(blocks, jnp.uint32)
    return Blocks(words, width, (width + negative * 128).astype(jnp.uint8))


def _turned(flat: jax.Array) -> jax.Array:
    """Returns an array's bits [n] uint32, rotated left by one within their dtype."""
    bits = 8 * flat.dtype.itemsize
    words = jax.lax.bitcast_convert_type(flat, jnp.uint16 if bits == 16 else jnp.uint32)
    return ((words << 1) | (words >> (bits - 1))).astype(jnp.uint32)


def _leading(words: jax.Array, count: jax.Array, dtype: DType) -> Blocks:
    """Returns the blocks of words, less each block's least leading byte."""
    shift = 8 * dtype.itemsize - 8
    at = jnp.arange(-(-words.size // BLOCK) * BLOCK).reshape(-1, BLOCK)
    blocks = padded_blocks(words)
    # The last block is padded with words that change neither.
    blocks = jnp.where(at < count, blocks, words[jnp.maximum(count - 1, 0)])
    leading = jnp.where(at[:, 0] < count, jnp.min(blocks, axis=1) >> shift, 0)
    rests = jnp.where((at[:, 0] < count)[:, None], blocks - (leading << shift)[:, None], 0)
    widths = (32 - jax.lax.clz(jnp.max(rests, axis=1))).astype(jnp.int32)
    return Blocks(rests, widths, leading.astype(jnp.uint8), widths.astype(jnp.uint8))


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
      make: Creates ``Blocks`` from words and their number.
      is_raw: Whether only raw is possible.
      step: The step in the head.
    """
    size = words.size
    present = words != 0
    kept = jnp.sum(present, dtype=jnp.int32)
    compact = jax.lax.cond(
        8 * (size - kept) > size, lambda: compact_values(words, present), lambda: words
    )
    tried = jnp.where(8 * (size - kept) > size, kept, size)
    dense_blocks, sparse_blocks = make(words, jnp.int32(size)), make(compact, tried)
    dense = varied_section_bytes(dense_blocks, jnp.int32(size))
    sparse = sparse_bytes(size) + varied_section_bytes(sparse_blocks, tried)
    is_sparse = sparse < dense
    made = jax.tree.map(
        lambda sparse, other: jnp.where(is_sparse, sparse, other), sparse_blocks, dense_blocks
    )
    is_raw |= raw.size <= jnp.minimum(dense, sparse)
    most_width = MOST_WIDTH if dense_blocks.second is None else 8 * (raw.size // size)
    flags = is_sparse * np.uint32(SPARSE)
    return assemble(raw, is_raw, flags, jnp.asarray(step), present, made, most_width, raw.size)
