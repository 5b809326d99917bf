"""The bit-level codec: as many bits per element as wanted, packed with shifts and masks alone.

The parameter picks what is kept. Elements are taken in blocks of 64, in C order:

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

import math
import re
from enum import IntEnum
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from comms.codecs import bit_planes
from comms.codecs.base import Array, Bytes, register
from comms.codecs.bit_planes import BLOCK
from comms.codecs.cast import aligned_empty, check_float
from comms.errors import CodecError
from comms.wire.buffers import allocate_aligned
from comms.wire.frame import array_bytes

RAW, SPARSE, SIGNED = 1, 2, 4
HEAD_BYTES = 8
MOST_BITS, MOST_STOCHASTIC_BITS = 23, 15
TINY_EXPONENT = 27
"""Exponent, plus 127, of the smallest block that is not sent as zeros: 2^-100."""
NAN_EXPONENT = 255
MOST_WIDTH = 31
"""Bits of a multiple of the step, sign included, beyond which abs and rel send raw."""
LEAST_STEP, MOST_STEP = -125, 120
"""Exponents of the steps of abs and rel: they and their inverses are normal float32 numbers."""
_LEAST_BOUND, _LARGEST_BOUND = 2.0**-60, 2.0**60
_SLAB = 1 << 16  # elements; what is made of them stays in the second-level cache


class Mode(IntEnum):
    """What is kept of an element."""

    NEAREST = 0
    STOCHASTIC = 1
    ABSOLUTE = 2
    RELATIVE = 3
    LOSSLESS = 4


class Setting(NamedTuple):
    """What a parameter says.

    Attributes:
        mode: what is kept.
        bits: K; 0 with a bound and without loss.
        seed: of random rounding.
        bound: of abs and rel, a number of 8 significant bits.
    """

    mode: Mode
    bits: int = 0
    seed: int = 0
    bound: float = 0.0

    def parameter(self) -> int:
        """Returns it as a number: bits 0-7 K, 8-15 the mode, 16-31 the seed or the bound.

        The bound is the upper half of a float32's bits, cut off and not rounded, so that what is
        kept to is never more than was asked for.
        """
        upper = self.seed
        if self.mode in (Mode.ABSOLUTE, Mode.RELATIVE):
            nearest = np.float32(self.bound)
            if float(nearest) > self.bound:
                nearest = np.nextafter(nearest, np.float32(0))
            upper = int(nearest.view(np.uint32)) >> 16
        return self.bits | int(self.mode) << 8 | upper << 16

    @classmethod
    def of(cls, parameter: int) -> Setting:
        """Returns what a parameter says.

        Raises:
            CodecError: if it says nothing that the codec knows.
        """
        bits, mode, upper = parameter & 255, parameter >> 8 & 255, parameter >> 16
        try:
            kind = Mode(mode)
        except ValueError:
            raise CodecError(f"codec bits: parameter {parameter} has no known mode") from None
        if kind in (Mode.NEAREST, Mode.STOCHASTIC):
            most = MOST_BITS if kind is Mode.NEAREST else MOST_STOCHASTIC_BITS
            if not 1 <= bits <= most:
                raise CodecError(f"codec bits: an element has 1 to {most} bits, got {bits}")
            if upper > (255 if kind is Mode.STOCHASTIC else 0):
                raise CodecError(f"codec bits: a seed is 0 to 255, and bits:Ks has one; {upper}")
            return cls(kind, bits, seed=upper)
        if bits or (kind is Mode.LOSSLESS and upper) or upper > 0xFFFF:
            raise CodecError(f"codec bits: parameter {parameter} is none of {kind.name.lower()}")
        if kind is Mode.LOSSLESS:
            return cls(kind)
        bound = float(np.uint32(upper << 16).view(np.float32))
        largest = _LARGEST_BOUND if kind is Mode.ABSOLUTE else 1.0
        if not _LEAST_BOUND <= bound <= largest:
            raise CodecError(
                f"codec bits: a bound is {_LEAST_BOUND:g} to {largest:g}, got {bound:g}"
            )
        return cls(kind, bound=bound)


_WORDS = re.compile(r"(?P<bits>\d{1,2})s(?P<seed>\d{0,3})|(?P<kind>abs|rel)(?P<bound>[\d.e+-]+)")


class BitCodec:
    """Sends floating-point arrays in any number of bits, or within a bound."""

    name = "bits"
    code = 7
    default_parameter = 7
    exact_size = False

    def parameter_of(self, text: str) -> int:
        """Returns what ``6s``, ``6s17``, ``abs1e-3``, ``rel1e-3`` or ``lossless`` means."""
        if text == "lossless":
            return Setting(Mode.LOSSLESS).parameter()
        found = _WORDS.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            if found["kind"] is None:
                setting = Setting(Mode.STOCHASTIC, int(found["bits"]), int(found["seed"] or 0))
            else:
                mode = Mode.ABSOLUTE if found["kind"] == "abs" else Mode.RELATIVE
                setting = Setting(mode, bound=float(found["bound"]))
            parameter = setting.parameter()
        except ValueError:
            raise CodecError(
                f"codec 'bits:{text}': write bits:6 (bits per element), bits:6s (rounded at "
                "random), bits:abs1e-3 or bits:rel1e-3 (largest error), or bits:lossless"
            ) from None
        Setting.of(parameter)
        return parameter

    def precision_bits(self, parameter: int) -> int | None:
        """Returns K and the sign; a bound is the caller's own."""
        setting = Setting.of(parameter)
        return setting.bits + 1 if setting.bits else None

    def check(self, dtype: np.dtype[Any], parameter: int) -> None:
        """Takes floating-point types and the parameters that `Setting` knows."""
        check_float(self.name, dtype)
        Setting.of(parameter)

    def encoded_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...], parameter: int) -> int:
        """Returns the most that a payload takes."""
        setting = Setting.of(parameter)
        count = array_bytes(np.dtype(np.uint8), shape)
        most = count * dtype.itemsize
        if setting.bits:
            most = min(most, fixed_bytes(count, setting.bits + 1))
        return HEAD_BYTES + most

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns the smallest of the raw, the dense and the sparse form."""
        setting, flat = Setting.of(parameter), array.reshape(-1)
        if setting.mode is Mode.LOSSLESS:
            return _encode_lossless(flat)
        if setting.bits:
            return _encode_fixed(flat, setting)
        return _encode_bounded(flat, setting)

    def decode(
        self, payload: Bytes, dtype: np.dtype[Any], shape: tuple[int, ...], parameter: int
    ) -> Array:
        """Returns each element's multiple of its step.

        Raises:
            CodecError: if the payload is none of this codec.
        """
        setting, array = Setting.of(parameter), aligned_empty(dtype, shape)
        parts = Parts.of(payload, dtype, shape, parameter)
        if parts.raw is not None:
            array.reshape(-1).view(np.uint8)[...] = parts.raw
            return array
        if setting.mode is Mode.LOSSLESS:
            values = _decode_lossless(parts, dtype)
        else:
            if setting.bits:
                values = _decode_fixed(parts, setting.bits)
            else:
                values = _decode_bounded(parts, dtype)
            if dtype.itemsize == 2 or parts.step > 0:
                # Rounded up, the largest numbers of a type may leave it; NaNs stay NaNs.
                largest = largest_of(dtype)
                np.clip(values, -largest, largest, out=values)
        with np.errstate(over="ignore", invalid="ignore"):
            if parts.present is None:
                array.reshape(-1)[...] = values[: array.size]
            else:
                _spread(values, parts.present, array.reshape(-1))
        return array


def _spread(values: Array, present: Array, flat: Array) -> None:
    """Puts values where something is present and zeros elsewhere, with little memory beside."""
    flat[...] = 0
    at = 0
    for begin in range(0, flat.size, _SLAB):
        here = np.flatnonzero(present[begin : begin + _SLAB])
        flat[begin : begin + _SLAB][here] = values[at : at + here.size]
        at += here.size


class Parts(NamedTuple):
    """The sections of a payload, checked against each other.

    Attributes:
        signed: the flag of that name.
        step: the exponent of the step, with abs and rel.
        raw: the array's bytes; nothing of what follows is there then.
        present: which elements are not zero; None if all are in the blocks.
        kept: elements in the blocks.
        first: a byte for each block.
        second: another one, without loss.
        planes: uint64, of all blocks.
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
        cls, payload: Bytes, dtype: np.dtype[Any], shape: tuple[int, ...], parameter: int
    ) -> Parts:
        """Returns the sections of a payload.

        Raises:
            CodecError: if they do not fit the array or each other.
        """
        setting, size = Setting.of(parameter), array_bytes(np.dtype(np.uint8), shape)
        if payload.size < HEAD_BYTES:
            raise _broken(f"{payload.size} bytes have no head")
        flags, step = int(payload[:4].view("<u4")[0]), int(payload[4:8].view("<i4")[0])
        if flags & ~(RAW | SPARSE | SIGNED) or (flags & RAW and flags != RAW):
            raise _broken(f"its flags are {flags}")
        body = payload[HEAD_BYTES:]
        if flags & RAW:
            if body.size != size * dtype.itemsize:
                raise _broken(f"{body.size} raw bytes for {size} elements of {dtype}")
            return cls(raw=body)
        bounded = setting.mode in (Mode.ABSOLUTE, Mode.RELATIVE)
        if step and not (bounded and LEAST_STEP <= step <= MOST_STEP):
            raise _broken(f"its step is 2^{step}")
        at, count, present = 0, size, None
        if flags & SPARSE:
            at = padded(-(-size // 8))
            if at > body.size:
                raise _broken(f"{body.size} bytes do not hold the bitmap of {size} elements")
            bits = np.unpackbits(body[:at], bitorder="little").view(np.bool_)
            present, count = bits[:size], int(np.count_nonzero(bits))
            if count != np.count_nonzero(present):
                raise _broken("its bitmap has more elements than the array")
        blocks = -(-count // BLOCK)
        bytes_at, planes_at = at, at + padded(blocks)
        second_at = planes_at
        if setting.mode is Mode.LOSSLESS:
            planes_at += padded(blocks)
        if planes_at > body.size:
            raise _broken(f"{body.size} bytes do not hold {blocks} blocks")
        first = body[bytes_at : bytes_at + blocks]
        second = body[second_at : second_at + blocks if second_at < planes_at else second_at]
        signed = bool(flags & SIGNED)
        if setting.bits:
            planes = blocks * (setting.bits + signed)
        else:
            widths = first & 127 if bounded else second
            most = MOST_WIDTH if bounded else 8 * dtype.itemsize
            if widths.max(initial=0) > most:
                raise _broken(f"a block is {widths.max()} bits wide, at most {most} can be")
            planes = int(widths.sum(dtype=np.int64))
        if body.size - planes_at != 8 * planes:
            raise _broken(f"{body.size - planes_at} bytes do not hold {planes} planes")
        words = body[planes_at:].view("<u8")
        return cls(signed, step, None, present, count, first, second, words)


def largest_of(dtype: np.dtype[Any]) -> float:
    """Returns the largest finite number of a floating-point type."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def padded(nbytes: int) -> int:
    """Returns bytes filled up to a multiple of 8."""
    return -(-nbytes // 8) * 8


def fixed_bytes(count: int, width: int) -> int:
    """Returns the bytes, behind the head, of so many elements of so many bits in dense blocks."""
    blocks = -(-count // BLOCK)
    return padded(blocks) + 8 * blocks * width


def sparse_bytes(count: int) -> int:
    """Returns the bytes of the bitmap of so many elements."""
    return padded(-(-count // 8))


def step_exponent(setting: Setting, largest: float, dtype: np.dtype[Any]) -> int:
    """Returns j such that rounding to multiples of 2^j keeps the bound.

    An element is off by half a step, and where the step's multiple does not fit a narrow type as
    far again, since it is then rounded to a number no farther away than the element itself.

    Args:
        setting: abs or rel.
        largest: the array's largest magnitude, finite.
        dtype: the array's type.
    """
    if setting.mode is Mode.ABSOLUTE:
        exponent = math.frexp(setting.bound)[1] - 1
    elif largest == 0:
        return 0
    else:
        # Whole numbers: floor(log2(bound * largest)) without rounding on the way.
        (bound, first), (most, second) = math.frexp(setting.bound), math.frexp(largest)
        product = int(bound * 2**53) * int(most * 2**53)
        exponent = first + second - (2 if product < 1 << 105 else 1)
    return exponent + (dtype.itemsize >= 4)


def _broken(what: str) -> CodecError:
    return CodecError(f"a payload of codec bits that cannot be read: {what}")


def _payload(flags: int, *sections: Array, step: int = 0) -> Bytes:
    """Returns the head and the sections, each filled up to a multiple of 8 bytes."""
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


def _blocks(values: Array) -> Array:
    """Returns values [m, 64], the last block filled up with zeros."""
    missing = -values.size % BLOCK
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, BLOCK)


def _bitmap(present: Array) -> Array:
    return np.packbits(present, bitorder="little")


# --- an exponent per block --------------------------------------------------------------------


def _encode_fixed(flat: Array, setting: Setting) -> Bytes:
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
        return _payload(RAW, flat)
    sections = []
    if sparse < dense:
        flags |= SPARSE
        sections.append(_bitmap(present))
        values = values[np.flatnonzero(present)]
    blocks = -(-values.size // BLOCK)
    payload = _payload(flags, *sections, np.empty(padded(blocks) + 8 * blocks * width, np.uint8))
    at = HEAD_BYTES + (sparse_bytes(count) if flags & SPARSE else 0)
    exponents = payload[at : at + blocks]
    payload[at + blocks : at + padded(blocks)] = 0
    planes = payload[at + padded(blocks) :].view("<u8").reshape(blocks, width)
    seed = 0
    if setting.mode is Mode.STOCHASTIC:
        seed = int(np.bitwise_xor.reduce(values.view(np.uint32))) + setting.seed
    for begin in range(0, values.size, _SLAB):
        slab = _blocks(values[begin : begin + _SLAB])
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
        # With one bit the inverse of the largest step is no normal number; half of it twice is.
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
    """Returns what random rounding adds before it rounds down.

    Args:
        begin: index of the first element in its array, a multiple of 64.
        count: how many, a multiple of 64.
        seed: of the array.

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


def _decode_fixed(parts: Parts, k: int) -> Array:
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
    step = _SLAB // BLOCK
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


# --- a bound ----------------------------------------------------------------------------------


def _encode_bounded(flat: Array, setting: Setting) -> Bytes:
    kind = np.float64 if flat.dtype == np.float64 else np.float32
    values = flat.astype(kind, copy=False)
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    relative = setting.mode is Mode.RELATIVE
    if not math.isfinite(largest) or (relative and 0 < largest < 2.0**-60):
        return _payload(RAW, flat)
    step = step_exponent(setting, largest, flat.dtype)
    if math.frexp(largest)[1] - step >= MOST_WIDTH or step > MOST_STEP:
        return _payload(RAW, flat)
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
        return _payload(RAW, flat)
    if sparse < dense:
        planes = _pack_slabs(_blocks(packed).reshape(-1).view(np.uint32), sparse_marks & 127)
        return _payload(SPARSE, _bitmap(present), sparse_marks, *planes, step=step)
    planes = _pack_slabs(_blocks(whole).reshape(-1).view(np.uint32), dense_marks & 127)
    return _payload(0, dense_marks, *planes, step=step)


def _widths(whole: Array) -> Bytes:
    """Returns for each block of whole numbers [n] int32 its width, plus 128 if one is negative."""
    blocks = _blocks(whole)
    negative = blocks.min(axis=1) < 0
    top = (blocks ^ (blocks >> 31)).max(axis=1).view(np.uint32)
    marks: Bytes = bit_planes.bit_length(top) + negative * np.uint8(129)
    return marks


def _pack_slabs(words: Array, widths: Array) -> list[Array]:
    """Returns the planes of words, made slab by slab."""
    step = _SLAB // BLOCK
    return [
        bit_planes.pack_varied(words[at * BLOCK : (at + step) * BLOCK], widths[at : at + step])
        for at in range(0, widths.size, step)
    ]


def _unpack_slabs(planes: Array, widths: Array, bytes_each: int) -> Array:
    """Returns the words of all blocks."""
    words = np.empty(widths.size * BLOCK, f"<u{bytes_each}")
    at, step = 0, _SLAB // BLOCK
    for begin in range(0, widths.size, step):
        some = widths[begin : begin + step]
        stop = at + int(some.sum(dtype=np.int64))
        part = bit_planes.unpack_varied(planes[at:stop], some, bytes_each)
        words[begin * BLOCK : begin * BLOCK + part.size] = part
        at = stop
    return words


def _decode_bounded(parts: Parts, dtype: np.dtype[Any]) -> Array:
    widths, signed = parts.first & 127, parts.first > 127
    words = _unpack_slabs(parts.planes, widths, 4).view(np.int32).reshape(-1, BLOCK)
    # The highest bit of a block that has negative elements counts negative.
    sign = np.where(signed, np.int32(1) << (widths.astype(np.int32) - 1), 0)[:, None]
    words ^= sign
    words -= sign
    values: Array = words.reshape(-1).astype(np.float64 if dtype == np.float64 else np.float32)
    with np.errstate(over="ignore"):
        np.multiply(values, 2.0**parts.step, out=values)
    return values


# --- without loss -----------------------------------------------------------------------------


def _encode_lossless(flat: Array) -> Bytes:
    size = flat.dtype.itemsize
    bits = flat.view(f"<u{size}")
    one, rest = bits.dtype.type(1), bits.dtype.type(8 * size - 1)
    turned = (bits << one) | (bits >> rest)
    present = turned != 0
    kept = int(np.count_nonzero(present))
    forms: list[tuple[int, Array, list[Array]]] = [(0, turned, [])]
    if 8 * size * (turned.size - kept) > turned.size:
        forms.append((SPARSE, turned[np.flatnonzero(present)], [_bitmap(present)]))
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
        return _payload(RAW, flat)
    return _payload(flags, *sections, leading, widths, *_pack_slabs(rests, widths))


def _leading(words: Array) -> tuple[Bytes, Bytes, Array]:
    """Returns each block's least leading byte, its width without it, and the words without it."""
    # The last block is filled up with what changes neither.
    missing = -words.size % BLOCK
    if missing:
        words = np.concatenate([words, np.repeat(words[-1:], missing)])
    blocks = words.reshape(-1, BLOCK)
    shift = words.dtype.type(8 * words.dtype.itemsize - 8)
    leading = blocks.min(axis=1) >> shift
    rests = blocks - (leading << shift)[:, None]
    return leading.astype(np.uint8), bit_planes.bit_length(rests.max(axis=1)), rests.reshape(-1)


def _decode_lossless(parts: Parts, dtype: np.dtype[Any]) -> Array:
    size = dtype.itemsize
    words = _unpack_slabs(parts.planes, parts.second, size).reshape(-1, BLOCK)
    kind = words.dtype.type
    words += (parts.first.astype(words.dtype) << kind(8 * size - 8))[:, None]
    values: Array = ((words >> kind(1)) | (words << kind(8 * size - 1))).reshape(-1).view(dtype)
    return values


BITS = register(BitCodec())
