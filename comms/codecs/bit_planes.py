"""Whole numbers of few bits packed plane by plane, with masks and shifts only.

A block is 64 words. Its plane j is the 64 bits at position j of its words, word i's at bit i of a
little-endian uint64; a block of width w consists of its planes 0 to w - 1 in order. With widths
that differ by block no bit ever crosses a byte, and planes that are zero in all words of a block
are not stored.
"""

from __future__ import annotations

import numpy as np

from comms.arrays import Array

BLOCK = 64
"""Words in a block: those of one uint64 per plane."""


def pack(words: Array, width: int) -> Array:
    """Returns the planes of blocks.

    Args:
      words: [m * 64] of an unsigned type of 1, 2, 4 or 8 bytes; bits from ``width`` on are ignored.
      width: Number of bits of a word that are kept.

    Returns:
      [m, width] uint64.
    """
    lanes = words.view(np.uint8).reshape(words.size, words.itemsize)
    planes = np.empty((words.size // BLOCK, width), np.uint64)
    for at in range(0, width, 8):
        lane = np.ascontiguousarray(lanes[:, at // 8])
        for bit in range(min(8, width - at)):
            # packbits treats any non-zero byte as 1, so that the mask needs no shift.
            plane = np.packbits(lane & np.uint8(1 << bit), bitorder="little")
            planes[:, at + bit] = plane.view("<u8")
    return planes


def unpack(planes: Array, bytes_each: int, shift: int = 0) -> Array:
    """Returns the words of blocks, shifted to the left.

    Args:
      planes: [m, width] uint64.
      bytes_each: Bytes of a returned word: 1, 2, 4 or 8.
      shift: Number of zero bits below the lowest plane.

    Returns:
      [m * 64] unsigned.
    """
    blocks, width = planes.shape
    words = np.zeros((blocks * BLOCK, bytes_each), np.uint8)
    for at in range(shift // 8, -(-(width + shift) // 8)):
        lane = words.reshape(-1) if bytes_each == 1 else np.zeros(blocks * BLOCK, np.uint8)
        eight = lane.view(np.uint64)
        for place in range(max(at * 8, shift), min(at * 8 + 8, width + shift)):
            plane = np.ascontiguousarray(planes[:, place - shift]).view(np.uint8)
            bits = np.unpackbits(plane, bitorder="little").view(np.uint64)
            # Eight words at once: each byte is 0 or 1, so that no bit leaves its byte.
            bits <<= np.uint64(place & 7)
            eight |= bits
        if bytes_each > 1:
            words[:, at] = lane
    return words.reshape(-1).view(f"<u{bytes_each}")


def pack_varied(words: Array, widths: Array) -> Array:
    """Returns the planes of blocks, each of its own width.

    Args:
      words: [m * 64] unsigned.
      widths: [m], whole numbers.

    Returns:
      [sum of widths] uint64, block by block.
    """
    planes = pack(words, int(widths.max(initial=0)))
    packed: Array = planes[_present(widths, planes.shape[1])]
    return packed


def unpack_varied(packed: Array, widths: Array, bytes_each: int) -> Array:
    """Returns the words of blocks, each of its own width: the inverse of ``pack_varied``."""
    planes = np.zeros((widths.size, int(widths.max(initial=0))), np.uint64)
    planes[_present(widths, planes.shape[1])] = packed
    return unpack(planes, bytes_each)


def bit_length(values: Array) -> Array:
    """Returns the number of bits of each unsigned number, as uint8."""
    lengths = np.zeros(values.shape, np.uint8)
    for bit in range(8 * values.dtype.itemsize):
        lengths += (values >> values.dtype.type(bit)) != 0
    return lengths


def _present(widths: Array, most: int) -> Array:
    """Returns whether each block has each plane."""
    present: Array = np.arange(most, dtype=np.uint8)[None, :] < widths[:, None]
    return present
