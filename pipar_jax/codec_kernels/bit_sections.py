"""The sections of a payload of the bit-level codec under jit: words, packed and put together."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from comms.arrays import DType
from comms.codecs.bit_fixed import NAN_EXPONENT
from comms.codecs.bit_payload import (
    HEAD_BYTES,
    MOST_WIDTH,
    RAW,
    SIGNED,
    SPARSE,
    padded,
    sparse_bytes,
)
from comms.codecs.bit_planes import BLOCK
from comms.codecs.bit_settings import Mode, Setting


class Blocks(NamedTuple):
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


def assemble(
    raw: jax.Array,
    is_raw: jax.Array,
    flags: jax.Array,
    step: jax.Array,
    present: jax.Array,
    made: Blocks,
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
    sections = [
        (bitmap, jnp.where(is_sparse, sparse_bytes(size), 0)),
        (made.first, padded_length(used)),
    ]
    if made.second is not None:
        sections.append((made.second, padded_length(used)))
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
    head = make_head(jnp.where(is_raw, np.uint32(RAW), flags), jnp.where(is_raw, 0, step))
    payload = payload.at[:HEAD_BYTES].set(head)
    return payload, jnp.where(is_raw, HEAD_BYTES + raw.size, length).astype(jnp.int32)


def make_head(flags: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """Returns the first bytes of a payload, [HEAD_BYTES] uint8."""
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


def unpack(data: jax.Array, at: jax.Array, widths: jax.Array, most: int) -> jax.Array:
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


def multiplied(
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
        scale = jnp.where(first == 0, 0, power(exponent))
        scale = jnp.where(first == NAN_EXPONENT, jnp.nan, scale)
    else:
        signed = first > 127
        step = from_bytes(payload[4:8], np.dtype(np.int32))[0]
        scale = jnp.full(len(words), power(step))
    sign = jnp.where(signed & (widths > 0), 1 << jnp.maximum(widths - 1, 0), 0)[:, None]
    whole = jax.lax.bitcast_convert_type(words, jnp.int32)
    return ((whole ^ sign) - sign).astype(jnp.float32) * scale[:, None]


def largest_width(setting: Setting, dtype: DType) -> int:
    """Returns the largest number of bits of a word."""
    if setting.mode is Mode.LOSSLESS:
        return 8 * dtype.itemsize
    return setting.bits + 1 if setting.bits else MOST_WIDTH


def power(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent as float32, clipped to the exponents of normal numbers."""
    biased = jnp.clip(exponent + 127, 1, 254).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def compact_values(values: jax.Array, present: jax.Array) -> jax.Array:
    """Returns the present values, followed by zeros."""
    to = jnp.where(present, jnp.cumsum(present, dtype=jnp.int32) - 1, values.size)
    return jnp.zeros_like(values).at[to].set(values, mode="drop")


def padded_blocks(values: jax.Array) -> jax.Array:
    """Returns values in blocks, [m, 64], with zeros behind the last."""
    return jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def padded_length(nbytes: jax.Array) -> jax.Array:
    """Returns a number of bytes rounded up to a multiple of 8."""
    return -(-nbytes // 8) * 8


def fixed_section_bytes(count: jax.Array, width: jax.Array) -> jax.Array:
    """Returns the bytes of a section whose blocks have words of one width."""
    blocks = -(-count // BLOCK)
    return padded_length(blocks) + 8 * blocks * width


def varied_section_bytes(made: Blocks, count: jax.Array) -> jax.Array:
    """Returns the bytes of a section whose blocks have widths of their own."""
    bytes_each = 1 if made.second is None else 2
    return bytes_each * padded_length(-(-count // BLOCK)) + 8 * jnp.sum(made.widths)
