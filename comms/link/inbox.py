"""The receiving half of a link: frames to messages, limits before allocation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from comms.codecs.base import codec_of
from comms.errors import DamageError, FrameError, LimitError
from comms.link.allowance import Allowance
from comms.link.incoming import Assembly, Bundle, credit_cost, read_json
from comms.link.meter import RateMeter
from comms.options import Limits
from comms.wire.bounded_json import JsonBody, one_line
from comms.wire.buffers import BufferPool
from comms.wire.frame import (
    DTYPES,
    HEADER_BYTES,
    SEQUENCED,
    Flag,
    Header,
    Kind,
    Role,
    array_bytes,
    checksum_of,
)
from comms.wire.frame_reader import FrameReader
from comms.wire.transport import Transport

# Plain numbers: the operators of IntFlag cost microseconds, and these are used for every frame.
_CONTROL_LANE = int(Flag.CONTROL_LANE)
_BUNDLE = int(Flag.BUNDLE)
_BACK_TO_BACK = int(Flag.BACK_TO_BACK)
_CHECKED = int(Flag.CHECKED)
_LARGE_BYTES = 1 << 16
# Up to half a millisecond of bytes is read at once, from 64 KiB (on links of more than 1 Gbit/s):
# half a megabyte fits into the L2 cache of the copying core.
_WAKE_S = 0.0005
_WAKE_BYTES = 1 << 19


class Inbox:
    """Reads one stream; outlives its connections, of which ``restart`` announces each.

    Args:
      limits: Limits on memory for any peer.
      allowance: Limits for this peer; None before its admission.
      window_bytes: The credit given to the peer.
      pool: Pool of receive buffers.
      checked: Whether every payload of the peer must have a checksum.
      on_tensor: Called with each complete tensor.
      on_bundle: Called with each complete bundle.
      on_control: Called with each control message and its assembly.
      on_signal: Called with each frame without a message (status, ping, pong, goodbye).
    """

    def __init__(
        self,
        limits: Limits,
        allowance: Allowance | None,
        window_bytes: int,
        pool: BufferPool,
        checked: bool,
        *,
        on_tensor: Callable[[Assembly], None],
        on_bundle: Callable[[Bundle], None],
        on_control: Callable[[JsonBody, Assembly], None],
        on_signal: Callable[[Header, bytes], None],
    ) -> None:
        self._limits = limits
        self.allowance = allowance
        self._joined = False
        self._window_bytes = window_bytes
        self._pool = pool
        self.checked = checked
        self._on_tensor = on_tensor
        self._on_bundle = on_bundle
        self._on_control = on_control
        self._on_signal = on_signal
        self._reader = FrameReader(self._begin_frame, self._end_frame)
        self.rate = RateMeter()
        self.received = 0
        self.partial_bytes = 0
        self.frames_in = 0
        self.accepted_bytes = 0
        self.released_bytes = 0
        self._lanes: list[Assembly | None] = [None, None]
        self._bundle: Bundle | None = None
        self._signal = bytearray()
        self.proven = False

    @property
    def held_bytes(self) -> int:
        """Credited bytes that were received and not released yet."""
        return self.accepted_bytes - self.released_bytes

    @property
    def bytes_in(self) -> int:
        """Bytes read from connections."""
        return self._reader.bytes_in

    @property
    def last_read_s(self) -> float:
        """Time of the last read, on the monotonic clock."""
        return self._reader.last_read_s

    def settle(self) -> None:
        """Ends a connection: keeps and counts the part of an incomplete frame that was read."""
        rest = self._reader.settle()
        if rest is not None and rest[1] and rest[0].kind in SEQUENCED:
            header, filled = rest
            assembly = self._lanes[1 if header.flags & _CONTROL_LANE else 0]
            assert assembly is not None
            assembly.filled += filled
            self.partial_bytes += filled

    def restart(self, leftover: bytes) -> None:
        """Starts a connection; the peer continues after ``received`` and ``partial_bytes``."""
        self.settle()
        self.rate.restart()
        # Each connection must make progress, however short it is.
        self.proven = False
        self._reader.restart(leftover)

    def pump(self, transport: Transport, budget_bytes: int) -> bool:
        """Reads as ``FrameReader.pump`` does and calls back for complete messages."""
        return self._reader.pump(transport, budget_bytes)

    # -- frames --------------------------------------------------------------------------------

    def _begin_frame(self, header: Header, shape: tuple[int, ...]) -> memoryview:
        """Checks a frame against the stream and the limits and returns where its payload goes."""
        if self.checked and not header.flags & _CHECKED:
            raise FrameError("a frame without a checksum, which the two sides agreed on")
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
            if self.allowance is None:
                self._check_join(header)
            assembly = self._begin_message(header, shape)
            self._lanes[lane] = assembly
        if header.length == 0 and header.total != 0:
            raise FrameError("an empty chunk")
        self._look_ahead(header, assembly)
        return assembly.buffer.data[header.offset : header.offset + header.length]

    def _look_ahead(self, header: Header, assembly: Assembly) -> None:
        """Expects another large frame after one, such as the next chunk."""
        if header.length < _LARGE_BYTES:
            self._reader.expect()
            return
        goes_on = header.offset + header.length < header.total
        gather = min(_WAKE_BYTES, int((self.rate.bytes_per_s or 0.0) * _WAKE_S))
        self._reader.expect(
            HEADER_BYTES + (0 if goes_on else 8 * len(assembly.shape)),
            gather if gather >= _LARGE_BYTES and self.proven else 1,
        )

    def _check_join(self, header: Header) -> None:
        """Allows a peer before its admission to send only one small control message."""
        what = f"a {Kind(header.kind).name.lower()} message"
        if header.kind != Kind.CONTROL or self._joined:
            second = "a second message" if self._joined else what
            raise FrameError(
                f"{second} arrived before this link was admitted: until then one control message "
                "is accepted"
            )
        if header.total > self._limits.join_bytes:
            raise LimitError(
                f"{what} of {header.total} bytes before this link was admitted; at most "
                f"{self._limits.join_bytes} are accepted until then (Limits.join_bytes)"
            )

    @property
    def _most(self) -> Allowance:
        """What the peer may send; before its admission ``_check_join`` restricts it further."""
        return Allowance.of(self._limits) if self.allowance is None else self.allowance

    def _begin_message(self, header: Header, shape: tuple[int, ...]) -> Assembly:
        """Checks the declarations of a message, then allocates its buffer."""
        assembly = Assembly(header, shape, self._reader.last_read_s)
        if header.kind == Kind.TENSOR:
            self._check_tensor(assembly)
            assembly.buffer, assembly.lease = self._pool.take(header.total)
            return assembly
        most_bytes = self._most.control_bytes
        if header.total > most_bytes or header.rank:
            raise LimitError(
                f"a {Kind(header.kind).name.lower()} message of {header.total} bytes and rank "
                f"{header.rank}; at most {most_bytes} bytes of rank 0 are accepted "
                "(Limits.control_bytes, Allowance.control_bytes)"
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
        held_bytes = max(raw_bytes, header.total)
        most_bytes = self._most.bundle_bytes if header.flags & _BUNDLE else self._most.tensor_bytes
        if header.rank > limits.rank or held_bytes > most_bytes:
            which = "bundle_bytes" if header.flags & _BUNDLE else "tensor_bytes"
            raise LimitError(
                f"{tag}: rank {header.rank} and {held_bytes} bytes declared; at most "
                f"{limits.rank} and {most_bytes} are accepted (Limits.rank, Limits.message_bytes, "
                f"Allowance.{which})"
            )
        # A shape such as (2**60, 0) has no bytes, yet numpy cannot represent it.
        if math.prod(size or 1 for size in assembly.shape) * dtype.itemsize > 1 << 60:
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
                raise FrameError(f"{tag}: tensor {header.part} of a bundle arrived out of order")
            if header.role != Role.WEIGHT:
                raise FrameError(f"{tag}: only weights travel in bundles")
            if bundle.held_bytes + held_bytes > most_bytes:
                raise LimitError(
                    f"bundle {bundle.name} exceeds {most_bytes} bytes (Limits.message_bytes, "
                    "Allowance.bundle_bytes)"
                )
        elif bundle is not None:
            raise FrameError(f"{tag}: arrived within bundle {bundle.name}, but is not part of it")
        assembly.codec, assembly.dtype = codec, dtype
        assembly.raw_bytes, assembly.cost = raw_bytes, cost

    def _end_frame(self, header: Header) -> None:
        self.frames_in += 1
        if header.kind not in SEQUENCED:
            _check(header, memoryview(self._signal))
            self._on_signal(header, bytes(self._signal))
            return
        lane = 1 if header.flags & _CONTROL_LANE else 0
        assembly = self._lanes[lane]
        assert assembly is not None
        # Parts of this frame from earlier connections are checked with the rest.
        begin, self.partial_bytes = header.offset - self.partial_bytes, 0
        try:
            _check(header, assembly.buffer.data[begin : header.offset + header.length])
        except DamageError:
            assembly.filled = begin
            raise
        frame_bytes = HEADER_BYTES + 8 * header.rank + header.length
        back_to_back = bool(header.flags & _BACK_TO_BACK)
        self.rate.add(frame_bytes, back_to_back, self._reader.last_read_s)
        self.received = header.sequence
        self.proven = True
        assembly.filled += header.length
        if assembly.filled < assembly.header.total:
            return
        self._lanes[lane] = None
        if assembly.header.kind == Kind.CONTROL:
            self._joined = True
            body = read_json(assembly, "a control message", "body")["body"]
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
            bundle.held_bytes += max(assembly.raw_bytes, assembly.header.total)
            if assembly.lease is not None:
                bundle.leases.append(assembly.lease)
            if len(bundle.payloads) == len(bundle.names):
                self._end_bundle(bundle)
        else:
            self.accepted_bytes += assembly.cost
            self._on_tensor(assembly)

    def _end_bundle(self, bundle: Bundle) -> None:
        self._bundle = None
        self._on_bundle(bundle)

    def _read_manifest(self, assembly: Assembly) -> Bundle:
        manifest = read_json(assembly, "a manifest", "name", "tensors", "body")
        name, names, body = manifest["name"], manifest["tensors"], manifest["body"]
        if not isinstance(name, str) or not isinstance(names, list) or not isinstance(body, dict):
            raise FrameError("a manifest without name, tensors and body of the right types")
        name = one_line(name, 200)
        if assembly.header.role != Role.WEIGHT:
            raise FrameError(f"bundle {name}: only weights travel in bundles")
        most = self._most.bundle_tensors
        if len(names) > most:
            raise LimitError(
                f"bundle {name} declares {len(names)} tensors; at most {most} are accepted "
                "(Limits.bundle_tensors, Allowance.bundle_tensors)"
            )
        if not all(isinstance(key, str) for key in names) or len(set(names)) != len(names):
            raise FrameError(f"bundle {name}: the names of its tensors are not distinct texts")
        return Bundle(name, names, body, assembly)


def _check(header: Header, payload: memoryview) -> None:
    """Compares a payload with its checksum, if it has one."""
    if header.flags & _CHECKED and checksum_of(payload) != header.checksum:
        raise DamageError(
            f"a {Kind(header.kind).name} frame's payload of {len(payload)} bytes does not match "
            "its checksum"
        )
