"""The lossless bit-level codec: each block's leading byte, and the rest of its words."""

from __future__ import annotations

import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs import bit_planes
from comms.codecs.bit_payload import (
    RAW,
    SPARSE,
    PayloadParts,
    bitmap_of,
    pack_payload,
    pack_slabs,
    padded,
    unpack_slabs,
)
from comms.codecs.bit_planes import BLOCK


def encode_lossless(flat: Array) -> Bytes:
    """Returns the lossless payload of values [n]."""
    size = flat.dtype.itemsize
    bits = flat.view(f"<u{size}")
    one, rest = bits.dtype.type(1), bits.dtype.type(8 * size - 1)
    turned = (bits << one) | (bits >> rest)
    present = turned != 0
    kept = int(np.count_nonzero(present))
    forms: list[tuple[int, Array, list[Array]]] = [(0, turned, [])]
    if 8 * size * (turned.size - kept) > turned.size:
        forms.append((SPARSE, turned[np.flatnonzero(present)], [bitmap_of(present)]))
    best: tuple[int, int, list[Array], Array, Array, Array] | None = None
    for flags, words, sections in forms:
        leading, widths, rests = _leading(words)
        total = sum(padded(part.nbytes) for part in sections) + 2 * padded(widths.size)
        total += 8 * int(widths.sum(dtype=np.int64))
        if best is None or total < best[0]:
            best = total, flags, sections, leading, widths, rests
    assert best is not None
    total, flags, sections, leading, widths, rests = best
    if flat.nbytes <= total:
        return pack_payload(RAW, flat)
    return pack_payload(flags, *sections, leading, widths, *pack_slabs(rests, widths))


def _leading(words: Array) -> tuple[Bytes, Bytes, Array]:
    """Returns each block's least leading byte, its width without it, and the words without it."""
    # The last block is padded with values that change neither.
    missing = -words.size % BLOCK
    if missing:
        words = np.concatenate([words, np.repeat(words[-1:], missing)])
    blocks = words.reshape(-1, BLOCK)
    shift = words.dtype.type(8 * words.dtype.itemsize - 8)
    leading = blocks.min(axis=1) >> shift
    rests = blocks - (leading << shift)[:, None]
    return leading.astype(np.uint8), bit_planes.bit_length(rests.max(axis=1)), rests.reshape(-1)


def decode_lossless(parts: PayloadParts, dtype: DType) -> Array:
    """Returns the values of all blocks, [64 m] of the type."""
    size = dtype.itemsize
    words = unpack_slabs(parts.planes, parts.second, size).reshape(-1, BLOCK)
    kind = words.dtype.type
    words += (parts.first.astype(words.dtype) << kind(8 * size - 8))[:, None]
    values: Array = ((words >> kind(1)) | (words << kind(8 * size - 1))).reshape(-1).view(dtype)
    return values
