"""The receiving half of a link: bytes to frames, frames to messages, limits before allocation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from comms.buffers import BufferPool, Lease
from comms.codec import Bytes, Codec, codec_of
from comms.errors import ChannelError, FrameError, LimitError
from comms.frame import (
    DTYPES,
    HEADER_BYTES,
    SEQUENCED,
    Flag,
    Header,
    Kind,
    Role,
    Tag,
    array_bytes,
    unpack_header,
    unpack_shape,
)
from comms.message import Payload
from comms.meter import RateMeter
from comms.options import Limits
from comms.transport import Transport

# Plain numbers: the operators of IntFlag cost microseconds, and these are used for every frame.
_CONTROL_LANE = int(Flag.CONTROL_LANE)
_BUNDLE = int(Flag.BUNDLE)
_BACK_TO_BACK = int(Flag.BACK_TO_BACK)
_STAGING_BYTES = 1 << 14
_SMALL_BYTES = 64
_LARGE_BYTES = 1 << 16
# Half a millisecond's bytes are waited for at once, from 64 KiB (on links of more than 1 Gbit/s):
# half a megabyte fits the second-level cache of the core that copies it.
_WAKE_S = 0.0005
_WAKE_BYTES = 1 << 19
_SMALLEST_SAMPLE_BYTES = 1 << 12
CREDITED = frozenset((Role.ACTIVATION, Role.COTANGENT))
"""Roles whose tensors consume credit; labels ride with their activation."""


def credit_cost(role: int, raw_bytes: int) -> int:
    """Returns the credit that a tensor takes: its size before the codec, at least 64 bytes."""
    return max(raw_bytes, _SMALL_BYTES) if role in CREDITED else 0


class Assembly:
    """A message whose chunks are arriving."""

    __slots__ = (
        "buffer", "codec", "cost", "dtype", "filled", "first_byte_s", "header", "lease",
        "raw_bytes", "sent_clock_s", "shape", "tag",
    )  # fmt: skip

    def __init__(self, header: Header, shape: tuple[int, ...], now_s: float) -> None:
        self.header = header
        self.shape = shape
        self.first_byte_s = now_s
        self.sent_clock_s = header.clock_s
        self.filled = 0
        self.cost = 0
        self.raw_bytes = header.total
        self.tag: Tag | None = None
        self.codec: Codec | None = None
        self.dtype: np.dtype[Any] | None = None
        self.buffer: Bytes
        self.lease: Lease | None = None

    def payload(self) -> Payload:
        """Returns the tensor."""
        assert self.codec is not None and self.dtype is not None
        return Payload(self.buffer, self.codec, self.header.codec_parameter, self.dtype, self.shape)


class Bundle:
    """A manifest and the tensors that arrived for it so far."""

    __slots__ = (
        "body",
        "first_byte_s",
        "leases",
        "name",
        "names",
        "nbytes",
        "payloads",
        "raw_bytes",
        "sent_clock_s",
        "tag",
    )  # fmt: skip

    def __init__(self, name: str, names: list[str], body: dict[str, Any], head: Assembly) -> None:
        self.name = name
        self.names = names
        self.body = body
        self.tag = head.header.tag()
        self.payloads: dict[str, Payload] = {}
        self.leases: list[Lease] = []
        self.nbytes = 0
        self.raw_bytes = 0
        self.first_byte_s = head.first_byte_s
        self.sent_clock_s = head.sent_clock_s


class Inbox:
    """Reads one stream; outlives its connections, of which `restart` announces each.

    Args:
        limits: what the peer may make us hold.
        window_bytes: the credit given to the peer.
        pool: where receive buffers come from.
        on_tensor: gets each complete tensor.
        on_bundle: gets each complete bundle.
        on_control: gets each control message and how it arrived.
        on_signal: gets each frame that carries no message (status, ping, pong, goodbye).
    """

    def __init__(
        self,
        limits: Limits,
        window_bytes: int,
        pool: BufferPool,
        *,
        on_tensor: Callable[[Assembly], None],
        on_bundle: Callable[[Bundle], None],
        on_control: Callable[[dict[str, Any], Assembly], None],
        on_signal: Callable[[Header, bytes], None],
    ) -> None:
        self._limits = limits
        self._window_bytes = window_bytes
        self._pool = pool
        self._on_tensor = on_tensor
        self._on_bundle = on_bundle
        self._on_control = on_control
        self._on_signal = on_signal
        self.rate = RateMeter()
        self.received = 0
        self.partial_bytes = 0
        self.frames_in = 0
        self.bytes_in = 0
        self.accepted_bytes = 0
        self.released_bytes = 0
        self.last_read_s = time.monotonic()
        self._lanes: list[Assembly | None] = [None, None]
        self._bundle: Bundle | None = None
        self._target_filled = 0
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._start = 0
        self._end = 0
        self._ahead_bytes = _STAGING_BYTES
        self._wake_bytes = 1
        self._signal = bytearray()
        self._header: Header | None = None
        self._target: memoryview | None = None

    @property
    def held_bytes(self) -> int:
        """Credited bytes that were received and not released yet."""
        return self.accepted_bytes - self.released_bytes

    def settle(self) -> None:
        """Ends a connection: what was read of an unfinished frame is kept and counted."""
        header = self._header
        if header is not None and header.kind in SEQUENCED and self._target_filled:
            assembly = self._lanes[1 if header.flags & _CONTROL_LANE else 0]
            assert assembly is not None
            assembly.filled += self._target_filled
            self.partial_bytes += self._target_filled
        self._start = self._end = 0
        self._ahead_bytes, self._wake_bytes = _STAGING_BYTES, 1
        self._header = self._target = None

    def restart(self, leftover: bytes) -> None:
        """Begins a connection; the peer sends on behind `received` and `partial_bytes`."""
        self.settle()
        self.rate.restart()
        self.last_read_s = time.monotonic()
        view = memoryview(leftover)
        while view:
            taken = min(len(view), _STAGING_BYTES - self._end)
            self._staging[self._end : self._end + taken] = view[:taken]
            self._end += taken
            view = view[taken:]
            self._parse()
            self._compact()

    def pump(self, transport: Transport, budget_bytes: int) -> bool:
        """Reads until the connection would wait or the budget is used up.

        Returns:
            Whether there may be more to read at once.

        Raises:
            ConnectionEnded: if the connection is over.
            FrameError: if the peer sent what is no valid frame.
        """
        while budget_bytes > 0:
            target = self._target
            if target is not None:
                rest = target[self._target_filled :]
                room = self._staging[: self._ahead_bytes]
                count = transport.receive(rest, room)
                if count is not None:
                    inside = min(count, len(rest))
                    self._target_filled += inside
                    self._end = count - inside
                full = count == len(rest) + len(room)
            else:
                self._compact()
                room = self._staging[self._end : max(self._ahead_bytes, self._end + HEADER_BYTES)]
                count = transport.receive(room)
                if count is not None:
                    self._end += count
                full = count == len(room)
            if count is None:
                self._await_rest(transport)
                return False
            self.bytes_in += count
            budget_bytes -= count
            self.last_read_s = time.monotonic()
            self._parse()
            # A short read emptied the kernel's buffer; asking again would only be told to wait.
            if not full:
                self._await_rest(transport)
                return False
        return True

    def _await_rest(self, transport: Transport) -> None:
        """Lets the rest of a large frame gather before this thread is woken, on a fast link."""
        rest = 0 if self._target is None else len(self._target) - self._target_filled
        transport.wake_at(max(1, min(rest, self._wake_bytes)))

    def _compact(self) -> None:
        if self._start:
            rest = self._end - self._start
            self._staging[:rest] = bytes(self._staging[self._start : self._end])
            self._start, self._end = 0, rest

    def _parse(self) -> None:
        """Goes through what was read, frame by frame."""
        while True:
            if self._target is not None:
                count = min(self._end - self._start, len(self._target) - self._target_filled)
                if count:
                    self._target[self._target_filled : self._target_filled + count] = self._staging[
                        self._start : self._start + count
                    ]
                    self._target_filled += count
                    self._start += count
                if self._target_filled < len(self._target):
                    break
                header, self._header, self._target = self._header, None, None
                assert header is not None
                self._end_frame(header)
                continue
            available = self._end - self._start
            if available < HEADER_BYTES:
                break
            header = unpack_header(self._staging[self._start :])
            head_bytes = HEADER_BYTES + 8 * header.rank
            if available < head_bytes:
                break
            shape = unpack_shape(self._staging[self._start + HEADER_BYTES :], header.rank)
            target = self._begin_frame(header, shape)
            self._start += head_bytes
            self._header, self._target, self._target_filled = header, target, 0
        if self._start == self._end:
            self._start = self._end = 0

    # -- frames --------------------------------------------------------------------------------

    def _begin_frame(self, header: Header, shape: tuple[int, ...]) -> memoryview:
        """Checks a frame against the stream and the limits and returns where its payload goes."""
        if header.kind not in SEQUENCED:
            if header.length > 4096 or header.length != header.total:
                raise LimitError(f"a {Kind(header.kind).name} frame of {header.length} bytes")
            self._signal = bytearray(header.length)
            return memoryview(self._signal)
        if header.sequence != self.received + 1:
            raise FrameError(
                f"frame {header.sequence} arrived where {self.received + 1} was expected"
            )
        lane = 1 if header.flags & _CONTROL_LANE else 0
        assembly = self._lanes[lane]
        if header.kind == Kind.CHUNK:
            if assembly is None:
                raise FrameError("a chunk arrived without the beginning of its message")
            if (header.offset, header.total) != (assembly.filled, assembly.header.total):
                raise FrameError(
                    f"a chunk at {header.offset} of {header.total} bytes arrived where "
                    f"{assembly.filled} of {assembly.header.total} was expected"
                )
        else:
            if assembly is not None and assembly.filled:
                raise FrameError("a message began before the one before it was complete")
            if header.offset != 0 or (header.kind == Kind.CONTROL) != bool(lane):
                raise FrameError("a message began with an offset or in the wrong lane")
            assembly = self._begin_message(header, shape)
            self._lanes[lane] = assembly
        if header.length == 0 and header.total != 0:
            raise FrameError("an empty chunk")
        return assembly.buffer.data[header.offset : header.offset + header.length]

    def _begin_message(self, header: Header, shape: tuple[int, ...]) -> Assembly:
        """Checks what a message declares; only then allocates its buffer."""
        assembly = Assembly(header, shape, self.last_read_s)
        if header.kind == Kind.TENSOR:
            self._check_tensor(assembly)
            assembly.buffer, assembly.lease = self._pool.take(header.total)
            return assembly
        if header.total > self._limits.control_bytes or header.rank:
            raise LimitError(
                f"a {Kind(header.kind).name.lower()} message of {header.total} bytes; "
                f"at most {self._limits.control_bytes} are taken (Limits.control_bytes)"
            )
        if header.kind == Kind.MANIFEST and self._bundle is not None:
            raise FrameError("a manifest arrived before the bundle before it was complete")
        assembly.buffer = np.empty(header.total, dtype=np.uint8)
        return assembly

    def _check_tensor(self, assembly: Assembly) -> None:
        header, limits = assembly.header, self._limits
        tag = assembly.tag = header.tag()
        dtype = DTYPES.get(header.dtype)
        if dtype is None:
            raise FrameError(f"{tag}: unknown element type {header.dtype}")
        codec = codec_of(header.codec)
        codec.check(dtype, header.codec_parameter)
        raw_bytes = array_bytes(dtype, assembly.shape)
        if header.rank > limits.rank or max(raw_bytes, header.total) > limits.message_bytes:
            raise LimitError(
                f"{tag}: rank {header.rank} and {max(raw_bytes, header.total)} bytes declared; "
                f"at most {limits.rank} and {limits.message_bytes} are taken (Limits.rank, "
                "Limits.message_bytes)"
            )
        # A shape such as (2**60, 0) has no bytes, and yet is none that numpy can hold.
        if any(size > 1 << 48 for size in assembly.shape):
            raise LimitError(f"{tag}: shape {assembly.shape} is too large")
        expected = codec.encoded_bytes(dtype, assembly.shape, header.codec_parameter)
        if header.total != expected if codec.exact_size else header.total > expected:
            raise FrameError(
                f"{tag}: {header.total} bytes declared for shape {assembly.shape} of {dtype} in "
                f"codec {codec.name}, expected {expected}"
            )
        cost = credit_cost(header.role, raw_bytes)
        if cost and self.held_bytes and self.held_bytes + cost > self._window_bytes:
            raise LimitError(
                f"{tag}: {cost} bytes sent without credit: {self.held_bytes} of "
                f"{self._window_bytes} are not released yet"
            )
        bundle = self._bundle
        if header.flags & _BUNDLE:
            if bundle is None or header.part != len(bundle.payloads):
                raise FrameError(f"{tag}: tensor {header.part} of a bundle arrived out of turn")
            if header.role != Role.WEIGHT:
                raise FrameError(f"{tag}: only weights travel in bundles")
            if bundle.raw_bytes + max(raw_bytes, header.total) > limits.message_bytes:
                raise LimitError(f"bundle {bundle.name} exceeds {limits.message_bytes} bytes")
        elif bundle is not None:
            raise FrameError(f"{tag}: arrived within bundle {bundle.name} but is no part of it")
        assembly.codec, assembly.dtype = codec, dtype
        assembly.raw_bytes, assembly.cost = raw_bytes, cost

    def _end_frame(self, header: Header) -> None:
        self.frames_in += 1
        if header.kind not in SEQUENCED:
            self._on_signal(header, bytes(self._signal))
            return
        frame_bytes = HEADER_BYTES + 8 * header.rank + header.length
        # A small frame's time is that of this program, not of the link.
        pure = bool(header.flags & _BACK_TO_BACK) and frame_bytes >= _SMALLEST_SAMPLE_BYTES
        self.rate.add(frame_bytes, pure, self.last_read_s)
        self.received = header.sequence
        self.partial_bytes = 0
        lane = 1 if header.flags & _CONTROL_LANE else 0
        assembly = self._lanes[lane]
        assert assembly is not None
        assembly.filled += header.length
        self._look_ahead(frame_bytes, assembly)
        if assembly.filled < assembly.header.total:
            return
        self._lanes[lane] = None
        if assembly.header.kind == Kind.CONTROL:
            body = _read_json(assembly).get("body")
            if not isinstance(body, dict):
                raise FrameError("a control message without a body")
            self._on_control(body, assembly)
        elif assembly.header.kind == Kind.MANIFEST:
            self._bundle = self._read_manifest(assembly)
            if not self._bundle.names:
                self._end_bundle(self._bundle)
        elif self._bundle is not None:
            bundle = self._bundle
            bundle.payloads[bundle.names[len(bundle.payloads)]] = assembly.payload()
            bundle.nbytes += assembly.header.total
            bundle.raw_bytes += assembly.raw_bytes
            if assembly.lease is not None:
                bundle.leases.append(assembly.lease)
            if len(bundle.payloads) == len(bundle.names):
                self._end_bundle(bundle)
        else:
            self.accepted_bytes += assembly.cost
            self._on_tensor(assembly)

    def _look_ahead(self, frame_bytes: int, assembly: Assembly) -> None:
        """Behind a large frame reads the next one's head and no further, if there is another.

        The payload then lands at the beginning of its aligned buffer at once, with no copy.
        """
        self._ahead_bytes, self._wake_bytes = _STAGING_BYTES, 1
        if frame_bytes < _LARGE_BYTES:
            return
        goes_on = assembly.filled < assembly.header.total
        self._ahead_bytes = HEADER_BYTES + (0 if goes_on else 8 * len(assembly.shape))
        gather = min(_WAKE_BYTES, int((self.rate.bytes_per_s or 0.0) * _WAKE_S))
        if gather >= _LARGE_BYTES:
            self._wake_bytes = gather

    def _end_bundle(self, bundle: Bundle) -> None:
        self._bundle = None
        self._on_bundle(bundle)

    def _read_manifest(self, assembly: Assembly) -> Bundle:
        manifest = _read_json(assembly)
        name, names, body = manifest.get("name"), manifest.get("tensors"), manifest.get("body")
        if not isinstance(name, str) or not isinstance(names, list) or not isinstance(body, dict):
            raise FrameError("a manifest without name, tensors and body")
        if len(names) > self._limits.bundle_tensors:
            raise LimitError(
                f"bundle {name} declares {len(names)} tensors; at most "
                f"{self._limits.bundle_tensors} are taken (Limits.bundle_tensors)"
            )
        if not all(isinstance(key, str) for key in names) or len(set(names)) != len(names):
            raise FrameError(f"bundle {name}: the names of its tensors are no distinct texts")
        return Bundle(name, names, body, assembly)


SCHEMA = 1
"""Version of the JSON of control messages and manifests."""


def pack_json(fields: dict[str, Any]) -> bytes:
    """Returns the JSON of a control message (body) or manifest (name, tensors, body).

    Raises:
        ChannelError: if the fields hold what JSON has no form for.
    """
    try:
        return json.dumps({"schema": SCHEMA, **fields}, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ChannelError(f"a control message must be plain JSON: {error}") from error


def _read_json(assembly: Assembly) -> dict[str, Any]:
    try:
        body = json.loads(assembly.buffer.tobytes())
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a control message that is no JSON: {error}") from error
    if not isinstance(body, dict) or body.pop("schema", None) != SCHEMA:
        raise FrameError(f"a control message without the JSON schema version {SCHEMA}")
    return body
