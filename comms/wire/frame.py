"""The wire format: one fixed header per frame, then the shape and the payload.

Every frame begins with these 108 bytes, little-endian, without padding:

====== ===== ================== ==========================================================
offset width field              meaning
====== ===== ================== ==========================================================
0      4     magic              the bytes ``PJXC``
4      2     version            version of the protocol, ``VERSION``
6      1     kind               ``Kind``: what the frame is
7      1     role               ``Role``: what a tensor is for (0 where there is no tensor)
8      1     codec              number of the codec that made the payload (0 = raw)
9      1     dtype              number of the element type before the codec, ``DTYPES``
10     1     rank               number of dimensions, at most ``MAX_RANK``; 0 in later chunks
11     1     flags              bits of ``Flag``
12     4     device             index of the device the tensor belongs to
16     4     stage              destination stage
20     4     step               optimiser step of that device
24     4     micro_batch        index of the micro-batch within the step
28     4     micro_batches      micro-batches in this step
32     4     samples_before     samples of the mini-batch that come before this micro-batch
36     4     samples            samples in this micro-batch
40     4     batch_samples      samples in the mini-batch
44     4     attempt            number of the attempt at a round the tensor belongs to
48     4     part               index of a tensor within its bundle, or of a target or side input
                                among those of its micro-batch
52     8     sequence           number of the frame in its direction, from 1; 0 = not numbered
60     8     offset             where this frame's payload begins within the whole payload
68     8     total              bytes of the whole payload (all chunks together)
76     8     length             bytes of payload in this frame
84     8     clock_s            the sender's monotonic clock when the frame left, float64 seconds
92     4     codec_parameter    what else the codec needs to decode (block size, bits)
96     8     checksum           XXH3 (64 bits) of the whole payload that this frame had when it was
                                first sent, if ``Flag.CHECKED``; else 0
104    4     crc                CRC-32 of bytes 0 to 103 and of the shape
====== ===== ================== ==========================================================

The shape follows, ``rank`` unsigned 64-bit integers, then ``length`` bytes of payload. A payload
that exceeds the chunk size of the link is cut: the first frame has the kind of the message, the
rest are of kind ``Kind.CHUNK`` with offset, total and sequence, so that heartbeats and control
messages overtake a large tensor between two chunks. Numbers in the payload are little-endian.
There is no pickle anywhere: tensors are bytes, everything else is JSON or a fixed struct.
"""

from __future__ import annotations

import enum
import math
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import xxhash

from comms.arrays import DType
from comms.errors import ChannelError, DamageError, FrameError

MAGIC = b"PJXC"
VERSION = 4
MAX_RANK = 16
_U32 = 0xFFFFFFFF

_HEADER = struct.Struct("<4sHBBBBBBIIIIIIIIIIQQQQdIQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
assert HEADER_BYTES == 108
_RANK_AT = 10


class Role(enum.IntEnum):
    """The role of a tensor, which determines its credit and codec."""

    CONTROL = 0
    ACTIVATION = 1
    COTANGENT = 2
    LABEL = 3
    WEIGHT = 4
    SIDE = 5


class Kind(enum.IntEnum):
    """The kind of a frame."""

    TENSOR = 1
    CONTROL = 2
    MANIFEST = 3
    CHUNK = 4
    STATUS = 5
    PING = 6
    PONG = 7
    GOODBYE = 8


class Flag(enum.IntFlag):
    """Bits of the header's flags byte."""

    NONE = 0
    CONTROL_LANE = 1
    """The frame belongs to a control message (distinguishes the chunks of the two lanes)."""
    BUNDLE = 2
    """The tensor is part of the bundle with the last manifest."""
    BACK_TO_BACK = 4
    """The frame was waiting when the one before it left, so that its transfer time is exact."""
    CHECKED = 8
    """The header has a checksum of the payload."""


SEQUENCED = frozenset((Kind.TENSOR, Kind.CONTROL, Kind.MANIFEST, Kind.CHUNK))
"""Kinds that are numbered, acknowledged and sent again after a broken connection."""

STATUS = struct.Struct("<QQd")
"""Payload of STATUS: last sequence received, credit bytes given back so far, bytes/s received."""
MAX_RATE = 1e12
"""Maximum rate in a STATUS, in bytes per second."""
MAX_CLOCK_S = 1e12
"""The largest magnitude of a clock, in seconds."""
PING = struct.Struct("<d")
"""Payload of PING: the sender's monotonic clock in seconds."""
PONG = struct.Struct("<ddd")
"""Payload of PONG: the ping's clock, then the replier's clock on arrival and on leaving."""


def _dtype_table() -> dict[int, DType]:
    plain = {
        1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
        6: np.uint8, 7: np.uint16, 8: np.uint32, 9: np.uint64,
        10: np.float16, 11: np.float32, 12: np.float64, 13: np.complex64, 14: np.complex128,
        32: ml_dtypes.bfloat16, 33: ml_dtypes.float8_e4m3fn, 34: ml_dtypes.float8_e5m2,
        35: ml_dtypes.float8_e4m3fnuz, 36: ml_dtypes.float8_e5m2fnuz,
        37: ml_dtypes.float8_e4m3b11fnuz, 48: ml_dtypes.int4, 49: ml_dtypes.uint4,
    }  # fmt: skip
    return {code: np.dtype(kind) for code, kind in plain.items()}


DTYPES: dict[int, DType] = _dtype_table()
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_code(dtype: DType) -> int:
    """Returns the wire number of an element type.

    Raises:
      ChannelError: If the type has none (objects, strings, dates, structures).
    """
    code = _DTYPE_CODES.get(dtype.newbyteorder("=") if dtype.isbuiltin == 1 else dtype)
    if code is None:
        raise ChannelError(
            f"an array of dtype {dtype} cannot be sent; "
            f"convert it to one of {', '.join(sorted(d.name for d in _DTYPE_CODES))}"
        )
    return code


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """The header's fields about a tensor, apart from its type, shape and codec.

    Attributes:
        attempt: counts the attempts at rounds over a run, so that what belongs to one that was
            given up can be told from what is expected.
        entry: index of a target or side input among those of its micro-batch.
    """

    role: Role
    device: int = 0
    stage: int = 0
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 1
    samples_before: int = 0
    samples: int = 0
    batch_samples: int = 0
    attempt: int = 0
    entry: int = 0

    def __str__(self) -> str:
        """Returns the name of the tensor for error messages."""
        return (
            f"{self.role.name.lower()} of device {self.device}, stage {self.stage}, "
            f"step {self.step}, micro-batch {self.micro_batch} of {self.micro_batches}"
        )


_TagFields: TypeAlias = tuple[int, int, int, int, int, int, int, int, int]
_NO_TAG: _TagFields = (0, 0, 0, 0, 0, 0, 0, 0, 0)


class Header(NamedTuple):
    """The fields of a frame's header after the magic and the version; see the module."""

    kind: int
    role: int = 0
    codec: int = 0
    dtype: int = 0
    rank: int = 0
    flags: int = 0
    device: int = 0
    stage: int = 0
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 0
    samples_before: int = 0
    samples: int = 0
    batch_samples: int = 0
    attempt: int = 0
    part: int = 0
    sequence: int = 0
    offset: int = 0
    total: int = 0
    length: int = 0
    clock_s: float = 0.0
    codec_parameter: int = 0
    checksum: int = 0

    def tag(self) -> Tag:
        """Returns the tensor's tag.

        Raises:
          FrameError: If the role is not one of ``Role``.
        """
        if self.role > max(Role):
            raise FrameError(f"the frame has role {self.role}; known are 0 to {int(max(Role))}")
        return Tag(
            role=Role(self.role),
            device=self.device,
            stage=self.stage,
            step=self.step,
            micro_batch=self.micro_batch,
            micro_batches=self.micro_batches,
            samples_before=self.samples_before,
            samples=self.samples,
            batch_samples=self.batch_samples,
            attempt=self.attempt,
            entry=0 if self.role == Role.WEIGHT else self.part,
        )


def pack_header(header: Header, shape: tuple[int, ...] = ()) -> bytes:
    """Returns the bytes of a header and the shape behind it.

    Raises:
      ChannelError: If a field does not fit its width.
    """
    try:
        head = _HEADER.pack(MAGIC, VERSION, *header)
    except struct.error as error:
        raise ChannelError(f"a field of the frame header is out of range: {header}") from error
    sizes = struct.pack(f"<{len(shape)}Q", *shape) if shape else b""
    return head + _CRC.pack(zlib.crc32(sizes, zlib.crc32(head))) + sizes


def checksum_of(payload: memoryview | bytes | bytearray) -> int:
    """Returns the checksum of a payload."""
    return xxhash.xxh3_64_intdigest(payload)


def tag_fields(tag: Tag | None) -> _TagFields:
    """Returns the tag's nine numbers in header order.

    Raises:
      ChannelError: If one is negative or exceeds 32 bits.
    """
    if tag is None:
        return _NO_TAG
    fields = (
        tag.device, tag.stage, tag.step, tag.micro_batch, tag.micro_batches,
        tag.samples_before, tag.samples, tag.batch_samples, tag.attempt,
    )  # fmt: skip
    for value in fields:
        if not 0 <= value <= _U32:
            raise ChannelError(f"{tag} has a field outside 0 to {_U32}: {fields}")
    return fields


def unpack_header(
    buffer: memoryview | bytes | bytearray,
) -> tuple[Header, tuple[int, ...]] | None:
    """Reads a header, of which at least ``HEADER_BYTES`` are available, and the shape after it.

    Returns:
      Header and shape, or None while the shape is incomplete.

    Raises:
      DamageError: If the bytes were damaged.
      FrameError: If they are not a header of this protocol version.
    """
    view = memoryview(buffer)
    magic, rank = bytes(view[: len(MAGIC)]), view[_RANK_AT]
    if magic != MAGIC:
        raise DamageError(f"the frame begins with {magic!r}, expected {MAGIC!r}")
    if rank > MAX_RANK:
        raise DamageError(f"the frame declares rank {rank}, at most {MAX_RANK} is accepted")
    end = HEADER_BYTES + 8 * rank
    if len(view) < end:
        return None
    (crc,) = _CRC.unpack_from(view, _HEADER.size)
    actual = zlib.crc32(view[HEADER_BYTES:end], zlib.crc32(view[: _HEADER.size]))
    if crc != actual:
        raise DamageError(f"the header's CRC-32 is {actual:08x}, expected {crc:08x}")
    _, version, *fields = _HEADER.unpack_from(view)
    if version != VERSION:
        raise FrameError(f"the frame is of protocol version {version}, this side uses {VERSION}")
    header = Header._make(fields)
    if not Kind.TENSOR <= header.kind <= Kind.GOODBYE:
        raise FrameError(f"unknown kind of frame: {header.kind}")
    if header.offset + header.length > header.total:
        raise FrameError(
            f"the frame's {header.length} bytes at offset {header.offset} "
            f"exceed the {header.total} it declares in total"
        )
    if not abs(header.clock_s) <= MAX_CLOCK_S:
        raise FrameError(f"the frame's clock shows {header.clock_s} s")
    return header, struct.unpack_from(f"<{rank}Q", view, HEADER_BYTES)


def array_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Returns the size of an array in bytes, in exact integer arithmetic for any declared shape."""
    return math.prod(shape) * dtype.itemsize
