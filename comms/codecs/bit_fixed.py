"""The bit-level codec with K bits per element: an exponent per block, nearest or at random."""

from __future__ import annotations

import numpy as np

from comms.arrays import Array, Bytes
from comms.codecs import bit_planes
from comms.codecs.bit_payload import (
    HEAD_BYTES,
    RAW,
    SIGNED,
    SLAB,
    SPARSE,
    PayloadParts,
    bitmap_of,
    fixed_bytes,
    in_blocks,
    pack_payload,
    padded,
    sparse_bytes,
)
from comms.codecs.bit_planes import BLOCK
from comms.codecs.bit_settings import Mode, Setting

TINY_EXPONENT = 27
"""Exponent, plus 127, of the smallest block that is not sent as zeros: 2^-100."""
NAN_EXPONENT = 255


def encode_fixed(flat: Array, setting: Setting) -> Bytes:
    """Returns the payload of values [n], each in K bits, with a sign if any is negative."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = flat.astype(np.float32, copy=False)
    count, bits = values.size, values.view(np.int32)
    flags = SIGNED if bits.min(initial=0) < 0 else 0
    width = setting.bits + bool(flags)
    present = values != 0
    kept = int(np.count_nonzero(present))
    dense = fixed_bytes(count, width)
    sparse = sparse_bytes(count) + fixed_bytes(kept, width)
    if flat.nbytes <= min(dense, sparse):
        return pack_payload(RAW, flat)
    sections = []
    if sparse < dense:
        flags |= SPARSE
        sections.append(bitmap_of(present))
        values = values[np.flatnonzero(present)]
    blocks = -(-values.size // BLOCK)
    payload = pack_payload(
        flags, *sections, np.empty(padded(blocks) + 8 * blocks * width, np.uint8)
    )
    at = HEAD_BYTES + (sparse_bytes(count) if flags & SPARSE else 0)
    exponents = payload[at : at + blocks]
    payload[at + blocks : at + padded(blocks)] = 0
    planes = payload[at + padded(blocks) :].view("<u8").reshape(blocks, width)
    seed = 0
    if setting.mode is Mode.STOCHASTIC:
        seed = int(np.bitwise_xor.reduce(values.view(np.uint32))) + setting.seed
    for begin in range(0, values.size, SLAB):
        slab = in_blocks(values[begin : begin + SLAB])
        rows = slice(begin // BLOCK, begin // BLOCK + len(slab))
        words = _multiples(slab, setting, exponents[rows], begin, seed, bool(flags & SIGNED))
        planes[rows] = bit_planes.pack(words, width)
    return payload


def _multiples(
    block: Array, setting: Setting, exponents: Bytes, begin: int, seed: int, signed: bool
) -> Array:
    """Returns the multiples of the steps of blocks [k, 64], and fills in their exponents [k]."""
    k = setting.bits
    bits = block.view(np.int32)
    magnitude = bits & np.int32(0x7FFFFFFF) if signed else bits
    top = magnitude.max(axis=1)
    # Rounded to k bits in the same way, the largest may reach the next power of two.
    up = 1 << (23 - k) if setting.mode is Mode.NEAREST else (1 << (24 - k)) - 1
    exponent = np.minimum((top + np.int32(up)) >> 23, 254)
    unusable = top < TINY_EXPONENT << 23
    infinite = top >= 255 << 23
    exponents[...] = exponent
    exponents[unusable] = 0
    exponents[infinite] = NAN_EXPONENT
    lost = unusable | infinite
    exponent[lost] = 127
    factor = np.ldexp(np.float32(1), k - 1 - (exponent - 127) + (k == 1))
    factor[lost] = 0
    with np.errstate(invalid="ignore", over="ignore"):
        # With K = 1 the inverse of the largest step is not a normal number; twice its half is.
        scaled = (block * np.float32(0.5) if k == 1 else block) * factor[:, None]
        if infinite.any():
            scaled[infinite] = 0
    if setting.mode is Mode.STOCHASTIC:
        scaled += draws(begin, block.size, seed).reshape(block.shape)
        np.floor(scaled, out=scaled)
    else:
        np.rint(scaled, out=scaled)
    if (exponent == 254).any():
        np.clip(scaled, 1 - (1 << k), (1 << k) - 1, out=scaled)
    size = 1 if k + signed <= 8 else 2 if k + signed <= 16 else 4
    words: Array = scaled.astype(f"{'i' if signed else 'u'}{size}").reshape(-1).view(f"<u{size}")
    return words


def draws(begin: int, count: int, seed: int) -> Array:
    """Returns the offsets that random rounding adds before it rounds down.

    Args:
      begin: Index of the first element in its array, a multiple of 64.
      count: Number of offsets, a multiple of 64.
      seed: Seed of the array.

    Returns:
      [count] float32 in (0, 1): a byte of a hash of the index and the seed, and a half, / 256.
    """
    at = np.arange(begin // 4, (begin + count) // 4, dtype=np.uint32)
    h = at * np.uint32(0x9E3779B9) + np.uint32(seed * 0x85EBCA6B & 0xFFFFFFFF)
    # The finaliser "lowbias32" of C. Wellons' hash prospector.
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    drawn = h.view(np.uint8).astype(np.float32)
    drawn += np.float32(0.5)
    drawn *= np.float32(1 / 256)
    return drawn


def decode_fixed(parts: PayloadParts, k: int) -> Array:
    """Returns the values of all blocks, [64 m] float32."""
    width = k + parts.signed
    bytes_each = 1 if width <= 8 else 2 if width <= 16 else 4
    # Two's complement at the top of its word, so that its sign is the word's; small words are
    # multiplied by a smaller step instead of being shifted back.
    shift = 8 * bytes_each - width if parts.signed else 0
    lower = shift if bytes_each < 4 else 0
    exponent = np.arange(256) + (1 - 127 - k - lower)
    with np.errstate(over="ignore"):
        steps = np.ldexp(np.float32(1), exponent)
    steps[0], steps[NAN_EXPONENT] = 0, np.nan
    values = np.empty((parts.first.size, BLOCK), np.float32)
    planes = parts.planes.reshape(-1, width)
    step = SLAB // BLOCK
    for begin in range(0, len(values), step):
        rows = slice(begin, begin + step)
        words = bit_planes.unpack(planes[rows], bytes_each, shift)
        if parts.signed:
            words = words.view(f"i{bytes_each}")
            if bytes_each == 4:
                words >>= np.int32(shift)
        with np.errstate(invalid="ignore", over="ignore"):
            scale = steps[parts.first[rows]][:, None]
            np.multiply(words.reshape(-1, BLOCK).astype(np.float32), scale, out=values[rows])
    return values.reshape(-1)
