"""The payload of the bit-level codec: its sections, made, measured and checked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.codecs import bit_planes
from comms.codecs.bit_planes import BLOCK
from comms.codecs.bit_settings import Mode, Setting
from comms.errors import CodecError
from comms.wire.buffers import allocate_aligned
from comms.wire.frame import array_bytes

RAW, SPARSE, SIGNED = 1, 2, 4
HEAD_BYTES = 8
MOST_WIDTH = 31
"""Bits of a multiple of the step, sign included, beyond which abs and rel send raw."""
LEAST_STEP, MOST_STEP = -125, 120
"""Exponents of the steps of abs and rel: they and their inverses are normal float32 numbers."""
SLAB = 1 << 16
"""Elements coded at a time; intermediate arrays stay in the second-level cache."""


class PayloadParts(NamedTuple):
    """The sections of a payload, checked against each other.

    Attributes:
      signed: The flag "signed".
      step: The exponent of the step, for abs and rel.
      raw: The array's bytes; the following sections are absent then.
      present: Mask of the non-zero elements; None if all elements are in the blocks.
      kept: Number of elements in the blocks.
      first: A byte for each block.
      second: A second byte for each block, for lossless.
      planes: Planes of all blocks, uint64.
    """

    signed: bool = False
    step: int = 0
    raw: Bytes | None = None
    present: Array | None = None
    kept: int = 0
    first: Bytes = np.empty(0, np.uint8)
    second: Bytes = np.empty(0, np.uint8)
    planes: Array = np.empty(0, np.uint64)

    @classmethod
    def of(
        cls, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> PayloadParts:
        """Returns the sections of a payload.

        Raises:
          CodecError: If they do not fit the array or each other.
        """
        setting, size = Setting.of(parameter), array_bytes(np.dtype(np.uint8), shape)
        if payload.size < HEAD_BYTES:
            raise broken(f"{payload.size} bytes have no head")
        flags, step = int(payload[:4].view("<u4")[0]), int(payload[4:8].view("<i4")[0])
        if flags & ~(RAW | SPARSE | SIGNED) or (flags & RAW and flags != RAW):
            raise broken(f"its flags are {flags}")
        body = payload[HEAD_BYTES:]
        if flags & RAW:
            if body.size != size * dtype.itemsize:
                raise broken(f"{body.size} raw bytes for {size} elements of {dtype}")
            return cls(raw=body)
        bounded = setting.mode in (Mode.ABSOLUTE, Mode.RELATIVE)
        if step and not (bounded and LEAST_STEP <= step <= MOST_STEP):
            raise broken(f"its step is 2^{step}")
        at, count, present = 0, size, None
        if flags & SPARSE:
            at = padded(-(-size // 8))
            if at > body.size:
                raise broken(f"{body.size} bytes do not hold the bitmap of {size} elements")
            bits = np.unpackbits(body[:at], bitorder="little").view(np.bool_)
            present, count = bits[:size], int(np.count_nonzero(bits))
            if count != np.count_nonzero(present):
                raise broken("its bitmap has more elements than the array")
        blocks = -(-count // BLOCK)
        bytes_at, planes_at = at, at + padded(blocks)
        second_at = planes_at
        if setting.mode is Mode.LOSSLESS:
            planes_at += padded(blocks)
        if planes_at > body.size:
            raise broken(f"{body.size} bytes do not hold {blocks} blocks")
        first = body[bytes_at : bytes_at + blocks]
        second = body[second_at : second_at + blocks if second_at < planes_at else second_at]
        signed = bool(flags & SIGNED)
        if setting.bits:
            planes = blocks * (setting.bits + signed)
        else:
            widths = first & 127 if bounded else second
            most = MOST_WIDTH if bounded else 8 * dtype.itemsize
            if widths.max(initial=0) > most:
                raise broken(f"a block is {widths.max()} bits wide, at most {most} can be")
            planes = int(widths.sum(dtype=np.int64))
        if body.size - planes_at != 8 * planes:
            raise broken(f"{body.size - planes_at} bytes do not hold {planes} planes")
        words = body[planes_at:].view("<u8")
        return cls(signed, step, None, present, count, first, second, words)


def padded(nbytes: int) -> int:
    """Returns a number of bytes rounded up to a multiple of 8."""
    return -(-nbytes // 8) * 8


def fixed_bytes(count: int, width: int) -> int:
    """Returns the bytes behind the head of ``count`` elements of ``width`` bits in dense blocks."""
    blocks = -(-count // BLOCK)
    return padded(blocks) + 8 * blocks * width


def sparse_bytes(count: int) -> int:
    """Returns the bytes of the bitmap of ``count`` elements."""
    return padded(-(-count // 8))


def broken(what: str) -> CodecError:
    """Returns the error for an invalid payload of this codec."""
    return CodecError(f"a payload of codec bits that cannot be read: {what}")


def pack_payload(flags: int, *sections: Array, step: int = 0) -> Bytes:
    """Returns the head and the sections, each padded to a multiple of 8 bytes."""
    parts = [section.reshape(-1).view(np.uint8) for section in sections]
    sizes = [part.size if flags & RAW else padded(part.size) for part in parts]
    payload = allocate_aligned(HEAD_BYTES + sum(sizes))
    payload[:4].view("<u4")[0], payload[4:8].view("<i4")[0] = flags, step
    at = HEAD_BYTES
    for part, size in zip(parts, sizes, strict=True):
        payload[at : at + part.size] = part
        payload[at + part.size : at + size] = 0
        at += size
    return payload


def in_blocks(values: Array) -> Array:
    """Returns values [m, 64], the last block padded with zeros."""
    missing = -values.size % BLOCK
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, BLOCK)


def bitmap_of(present: Array) -> Array:
    """Returns [n] bool as bits, the least significant first."""
    return np.packbits(present, bitorder="little")


def pack_slabs(words: Array, widths: Array) -> list[Array]:
    """Returns the planes of words, computed slab by slab."""
    step = SLAB // BLOCK
    return [
        bit_planes.pack_varied(words[at * BLOCK : (at + step) * BLOCK], widths[at : at + step])
        for at in range(0, widths.size, step)
    ]


def unpack_slabs(planes: Array, widths: Array, bytes_each: int) -> Array:
    """Returns the words of all blocks."""
    words = np.empty(widths.size * BLOCK, f"<u{bytes_each}")
    at, step = 0, SLAB // BLOCK
    for begin in range(0, widths.size, step):
        some = widths[begin : begin + step]
        stop = at + int(some.sum(dtype=np.int64))
        part = bit_planes.unpack_varied(planes[at:stop], some, bytes_each)
        words[begin * BLOCK : begin * BLOCK + part.size] = part
        at = stop
    return words
