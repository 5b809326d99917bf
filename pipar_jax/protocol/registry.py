"""The registry of messages, and their encoding and decoding.

On a link a message is the JSON object of its fields and ``type``, as a control message or as the
body of a bundle of the same name.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, dataclass_transform

from comms import ChannelError, CodecError, Encoded, FrameError, Link, MessageKind
from comms import Message as Arrived
from comms.arrays import Array
from comms.errors import DamageError
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.protocol.wire_fields import Mismatch, shown, struct

T = TypeVar("T", bound="ControlMessage")
Tensors = Mapping[str, Array | Encoded]


class ControlMessage:
    """Base of every message; see ``messages``."""

    __slots__ = ()


class Sender(enum.Enum):
    """Sender and receiver of a message."""

    HOST = "a device or compute node, or the server's own host, to the coordinator"
    COORDINATOR = "the coordinator to a device or compute node"
    NEIGHBOUR = "a neighbour in a chain to the other"
    BOTH = "coordinator and hosts to each other"


class Form(enum.Enum):
    """The form of a message on the wire."""

    CONTROL = "a control message"
    BUNDLE = "a bundle of tensors"
    EITHER = "either"


class MessageType(NamedTuple):
    """The registration of a message.

    Attributes:
      name: Value of ``type`` in its JSON.
      made: Its dataclass.
      sender: Its sender and receiver.
      form: Whether it carries tensors.
    """

    name: str
    made: type
    sender: Sender
    form: Form


#: All messages by name.
KINDS: dict[str, MessageType] = {}
_BY_CLASS: dict[type, MessageType] = {}


@dataclass_transform(frozen_default=True)
def message(name: str, sender: Sender, form: Form = Form.CONTROL) -> Callable[[type[T]], type[T]]:
    """Registers a class as a message under a name."""

    def register(made: type[T]) -> type[T]:
        frozen = dataclasses.dataclass(frozen=True, slots=True)(made)
        KINDS[name] = _BY_CLASS[frozen] = MessageType(name, frozen, sender, form)
        return frozen

    return register


def kind_of(made: type) -> MessageType:
    """Returns the registration of a message's class."""
    return _BY_CLASS[made]


def encode(message: ControlMessage) -> JsonObject:
    """Returns the JSON of a message."""
    made: type = type(message)
    return {"type": _BY_CLASS[made].name, **struct(made).write(message)}


def send(link: Link, message: ControlMessage) -> None:
    """Sends a message without tensors.

    Raises:
      ChannelError: See ``Link.send_control``.
    """
    link.send_control(encode(message))


def send_bundle(
    link: Link,
    message: ControlMessage,
    tensors: Tensors,
    *,
    on_sent: Callable[[float, float, int], None] | None = None,
    codec: str = "raw",
) -> None:
    """Sends a message with tensors.

    Raises:
      ChannelError: See ``Link.send_bundle``.
    """
    name = _BY_CLASS[type(message)].name
    link.send_bundle(name, tensors, encode(message), on_sent, codec=codec)


def end_of(link_error: ChannelError, peer: str, words: str) -> PeerError:
    """Returns the error for the end of a link: a lost peer, or a violation of the protocol.

    Args:
      link_error: Why the link ended.
      peer: Name of the peer for the message.
      words: Message for a lost peer.
    """
    if violation(link_error) is not None:
        return ProtocolError(f"{peer} violated the channel's protocol: {link_error}")
    return PeerError(f"{words}: {link_error}")


def violation(link_error: ChannelError) -> ChannelError | None:
    """Returns what of a peer's bytes has ended its link; None if it has ended otherwise."""
    cause = link_error.__cause__
    if isinstance(cause, FrameError | CodecError) and not isinstance(cause, DamageError):
        return cause
    return None


def peek(arrived: Arrived) -> MessageType | None:
    """Returns the registration of a message before decoding; None if its name is unknown."""
    name = arrived.body.get("type")
    return KINDS.get(name) if isinstance(name, str) else None


def decode(arrived: Arrived, sender: Sender, peer: str) -> ControlMessage:
    """Decodes a control message or the body of a bundle.

    Args:
      arrived: The message from a link.
      sender: Allowed sender and receiver.
      peer: Name of the peer, for the error.

    Raises:
      ProtocolError: The peer may not send this message, or a field is not valid.
    """
    body = dict(arrived.body)
    name = body.pop("type", None)
    known = KINDS.get(name) if isinstance(name, str) else None
    whose = (sender,) if sender is Sender.NEIGHBOUR else (sender, Sender.BOTH)
    if known is None or known.sender not in whose:
        theirs = sorted(kind.name for kind in KINDS.values() if kind.sender in whose)
        raise ProtocolError(
            f"{peer} sent a {arrived.kind} message of type {shown(name)}, expected one of "
            f"{', '.join(theirs)}: do both hosts run the same version?"
        )
    wrong = Form.CONTROL if arrived.kind == MessageKind.BUNDLE else Form.BUNDLE
    if known.form is wrong or (arrived.kind == MessageKind.BUNDLE and arrived.name != name):
        raise ProtocolError(
            f"{peer} sent {name!r} as a {arrived.kind} message {shown(arrived.name)}, expected "
            f"{known.form.value}: do both hosts run the same version?"
        )
    try:
        made: ControlMessage = struct(known.made).read(body, "")
    except Mismatch as error:
        raise ProtocolError(
            f"{peer} sent {name!r} with {error.path or 'fields'}={error.actual}, expected "
            f"{error.expected}: do both hosts run the same version?"
        ) from error
    return made
