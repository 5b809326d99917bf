"""Incomplete messages: tensors chunk by chunk, bundles tensor by tensor."""

from __future__ import annotations

from comms.arrays import Bytes, DType
from comms.codecs.base import Codec
from comms.errors import FrameError
from comms.link.message import Payload
from comms.wire import bounded_json
from comms.wire.bounded_json import JsonBody
from comms.wire.buffers import Lease
from comms.wire.frame import Header, Role, Tag

_SMALL_BYTES = 64
CREDITED = frozenset((Role.ACTIVATION, Role.COTANGENT))
"""Roles whose tensors consume credit; labels are covered by that of their activation."""


def credit_cost(role: int, raw_bytes: int) -> int:
    """Returns the credit of a tensor: its size before the codec, at least 64 bytes."""
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
        self.dtype: DType | None = None
        self.buffer: Bytes
        self.lease: Lease | None = None

    def payload(self) -> Payload:
        """Returns the tensor."""
        assert self.codec is not None and self.dtype is not None
        return Payload(self.buffer, self.codec, self.header.codec_parameter, self.dtype, self.shape)


class Bundle:
    """A manifest and its tensors that have arrived so far."""

    __slots__ = (
        "body",
        "first_byte_s",
        "held_bytes",
        "leases",
        "name",
        "names",
        "nbytes",
        "payloads",
        "raw_bytes",
        "sent_clock_s",
        "tag",
    )  # fmt: skip

    def __init__(self, name: str, names: list[str], body: JsonBody, head: Assembly) -> None:
        self.name = name
        self.names = names
        self.body = body
        self.tag = head.header.tag()
        self.payloads: dict[str, Payload] = {}
        self.leases: list[Lease] = []
        self.nbytes = 0
        self.raw_bytes = 0
        self.held_bytes = 0
        self.first_byte_s = head.first_byte_s
        self.sent_clock_s = head.sent_clock_s


SCHEMA = 1
"""Version of the JSON of control messages and manifests."""


def pack_json(fields: JsonBody) -> bytes:
    """Returns the JSON of a control message (body) or manifest (name, tensors, body).

    Raises:
      ChannelError: If JSON cannot represent a field.
    """
    return bounded_json.encode({"schema": SCHEMA, **fields}, "a control message")


def read_json(assembly: Assembly, what: str, *names: str) -> JsonBody:
    """Returns the JSON of a complete control message or manifest, without its schema version.

    Args:
      assembly: The message.
      what: Its name in error messages.
      names: Its fields in addition to the schema version.

    Raises:
      FrameError: If it is not valid.
    """
    fields = bounded_json.decode(assembly.buffer.data, what)
    if fields.pop("schema", None) != SCHEMA:
        raise FrameError(f"{what} without the JSON schema version {SCHEMA}")
    if fields.keys() != set(names):
        raise FrameError(f"{what} without {', '.join(names)}, or with more than that")
    return fields
