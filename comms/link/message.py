"""Messages of a link: tensors, control messages and bundles of weights."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from comms.arrays import Array, Bytes, DType
from comms.codecs.base import Codec
from comms.errors import ChannelError, CodecError
from comms.wire.bounded_json import JsonBody, one_line
from comms.wire.frame import Tag

if TYPE_CHECKING:
    from comms.link.link import Link


class Payload:
    """A received tensor: its payload, and the array, decoded on first use.

    Attributes:
      data: The payload, [n] uint8, 64-byte aligned.
      codec: Its codec.
      parameter: The codec's parameter.
      dtype: Element type before the codec.
      shape: Shape before the codec.
    """

    __slots__ = ("_array", "codec", "data", "dtype", "parameter", "shape")

    def __init__(
        self,
        data: Bytes,
        codec: Codec,
        parameter: int,
        dtype: DType,
        shape: tuple[int, ...],
    ) -> None:
        self.data = data
        self.codec = codec
        self.parameter = parameter
        self.dtype = dtype
        self.shape = shape
        self._array: Array | None = None

    @property
    def array(self) -> Array:
        """The array; a view of ``data`` if the codec is raw, else decoded on first use.

        Raises:
          CodecError: If the payload is not valid for the codec.
        """
        if self._array is None:
            try:
                self._array = self.codec.decode(self.data, self.dtype, self.shape, self.parameter)
            except CodecError:
                raise
            except Exception as error:  # whatever numpy raises, the bytes are invalid
                raise self._unreadable(error) from error
        return self._array

    def check(self) -> None:
        """Checks that the payload can be decoded, without decoding it.

        Raises:
          CodecError: If the payload is not valid for the codec.
        """
        try:
            self.codec.check_payload(self.data, self.dtype, self.shape, self.parameter)
        except CodecError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CodecError:
        return CodecError(
            f"{self.data.size} bytes cannot be decoded by codec {self.codec.name} as "
            f"{self.dtype}{list(self.shape)}: {type(error).__name__}: {error}"
        )


class MessageKind(enum.StrEnum):
    """What a message is: a tensor (tag, array), control (body) or a bundle (all, tensors)."""

    TENSOR = "tensor"
    CONTROL = "control"
    BUNDLE = "bundle"


class Message:
    """A received message.

    Attributes:
      kind: What it is, and so which of the others it has.
      link: The link it came over.
      tag: Fields of the tensor in the header; None for control.
      name: Name of the bundle.
      body: The control message, or the additional values of the bundle.
      nbytes: Payload bytes on the wire.
      first_byte_s: Time at which its first byte was read, on the local monotonic clock.
      received_s: Time at which its last byte was read.
      sent_s: Time at which its first byte left the peer, converted to the local monotonic clock;
        None while the offset of the clocks is unknown.
    """

    __slots__ = (
        "_payloads",
        "_release",
        "body",
        "first_byte_s",
        "kind",
        "link",
        "name",
        "nbytes",
        "received_s",
        "sent_s",
        "tag",
    )

    def __init__(
        self,
        kind: MessageKind,
        link: Link,
        *,
        tag: Tag | None = None,
        name: str = "",
        body: JsonBody | None = None,
        payloads: dict[str, Payload] | None = None,
        nbytes: int = 0,
        first_byte_s: float = 0.0,
        received_s: float = 0.0,
        sent_s: float | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.kind = kind
        self.link = link
        self.tag = tag
        self.name = name
        self.body: JsonBody = {} if body is None else body
        self.nbytes = nbytes
        self.first_byte_s = first_byte_s
        self.received_s = received_s
        self.sent_s = sent_s
        self._payloads = payloads
        # A list, since popping its only item is atomic if several threads release at once.
        self._release = [] if release is None else [release]

    @property
    def payloads(self) -> dict[str, Payload]:
        """The received tensors by name (that of a single tensor is "").

        Raises:
          ChannelError: If the message has none, or was released.
        """
        if self._payloads is None:
            raise ChannelError(
                f"this {self.kind} message from {self.link.peer} has no tensors: "
                "it never had any, or release() was called"
            )
        return self._payloads

    @property
    def payload(self) -> Payload:
        """The payload of a "tensor" message, for decoding elsewhere."""
        return self.payloads[""]

    @property
    def array(self) -> Array:
        """The array of a "tensor" message, 64-byte aligned where it is raw.

        Raises:
          ChannelError: As for ``payloads``.
          CodecError: If the payload is not what the codec makes; it names peer and tensor.
        """
        return self._decode("", self.payload)

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays of a "bundle" message by name, in the sender's order.

        Raises:
          ChannelError: As for ``payloads``.
          CodecError: If a payload is not what its codec makes; it names peer and tensor.
        """
        return {name: self._decode(name, payload) for name, payload in self.payloads.items()}

    def _decode(self, name: str, payload: Payload) -> Array:
        try:
            return payload.array
        except CodecError as error:
            what = f"{one_line(name, 200)} of bundle {self.name}" if name else self.tag
            raise CodecError(f"{self.link.peer} sent {what}: {error}") from error

    def release(self) -> None:
        """Returns the credit to the peer and drops the buffers; may be called from any thread.

        Arrays of the message remain valid: their memory is reused only when they and all views of
        them are gone. Idempotent.
        """
        self._payloads = None
        try:
            release = self._release.pop()
        except IndexError:
            return
        release()

    def __repr__(self) -> str:
        """Returns the kind and the sender."""
        what = self.tag if self.tag is not None else self.body
        return f"<{self.kind} {self.name} {what} from {self.link.peer}, {self.nbytes} bytes>"
