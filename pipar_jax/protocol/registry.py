"""Which messages there are, and the way of each to the wire and back.

On a link a message is the JSON object of its fields and ``type``, as a control message or as the
body of a bundle of the same name.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import numpy as np

from comms import ChannelError, CodecError, FrameError, Link
from comms import Message as Arrived
from comms.errors import DamageError
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.protocol.wire_fields import Mismatch, shown, struct

T = TypeVar("T")
Tensors = Mapping[str, np.ndarray[Any, Any]]


class Sender(enum.Enum):
    """Who says a message, and to whom."""

    HOST = "a device or compute node, or the server's own host, to the coordinator"
    COORDINATOR = "the coordinator to a device or compute node"
    NEIGHBOUR = "a neighbour in a chain to the other"
    BOTH = "coordinator and hosts to each other"


class Form(enum.Enum):
    """How a message travels."""

    CONTROL = "a control message"
    BUNDLE = "a bundle of tensors"
    EITHER = "either"


class MessageKind(NamedTuple):
    """What is registered of a message.

    Attributes:
      name: What its JSON says as ``type``.
      made: Its dataclass.
      sender: Who says it.
      form: Whether tensors come with it.
    """

    name: str
    made: type
    sender: Sender
    form: Form


#: Every message by its name.
KINDS: dict[str, MessageKind] = {}
_BY_CLASS: dict[type, MessageKind] = {}


@dataclass_transform(frozen_default=True)
def message(name: str, sender: Sender, form: Form = Form.CONTROL) -> Callable[[type[T]], type[T]]:
    """Makes a class a message, under a name."""

    def register(made: type[T]) -> type[T]:
        frozen = dataclasses.dataclass(frozen=True, slots=True)(made)
        KINDS[name] = _BY_CLASS[frozen] = MessageKind(name, frozen, sender, form)
        return frozen

    return register


def kind_of(made: type) -> MessageKind:
    """Returns what is registered of a message's class."""
    return _BY_CLASS[made]


def encode(message: Any) -> dict[str, Any]:
    """Returns the JSON of a message."""
    made: type = type(message)
    return {"type": _BY_CLASS[made].name, **struct(made).write(message)}


def send(link: Link, message: Any) -> None:
    """Sends a message without tensors.

    Raises:
      ChannelError: See ``Link.send_control``.
    """
    link.send_control(encode(message))


def send_bundle(
    link: Link,
    message: Any,
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
    """Returns what the end of a link means: the peer is lost, or sent what no peer may.

    Args:
      link_error: Why the link ended.
      peer: The peer, in words.
      words: What to say where it is lost.
    """
    cause = link_error.__cause__
    if isinstance(cause, FrameError | CodecError) and not isinstance(cause, DamageError):
        return ProtocolError(f"{peer} sent what the channel does not take: {link_error}")
    return PeerError(f"{words}: {link_error}")


def peek(arrived: Arrived) -> MessageKind | None:
    """Returns which message has arrived, before it is read; None if there is no such."""
    name = arrived.body.get("type")
    return KINDS.get(name) if isinstance(name, str) else None


def decode(arrived: Arrived, sender: Sender, peer: str) -> Any:
    """Returns the message that arrived as a control message or a bundle.

    Args:
      arrived: What came over a link.
      sender: What its other side may be.
      peer: Who that is, for the error.

    Raises:
      ProtocolError: It is none that such a peer may send, or a field is not what it takes.
    """
    body = dict(arrived.body)
    name = body.pop("type", None)
    known = KINDS.get(name) if isinstance(name, str) else None
    whose = (sender,) if sender is Sender.NEIGHBOUR else (sender, Sender.BOTH)
    if known is None or known.sender not in whose:
        theirs = [one.name for one in KINDS.values() if one.sender in whose]
        raise ProtocolError(
            f"{peer} sent a {arrived.kind} message of type {shown(name)}, expected one of "
            f"{', '.join(theirs)}: do both hosts run the same version?"
        )
    wrong = Form.CONTROL if arrived.kind == "bundle" else Form.BUNDLE
    if known.form is wrong or (arrived.kind == "bundle" and arrived.name != name):
        raise ProtocolError(
            f"{peer} sent {name!r} as a {arrived.kind} message {shown(arrived.name)}, expected "
            f"{known.form.value}: do both hosts run the same version?"
        )
    try:
        return struct(known.made).read(body, "")
    except Mismatch as error:
        raise ProtocolError(
            f"{peer} sent {name!r} with {error.path or 'fields'}={error.actual}, expected "
            f"{error.expected}: do both hosts run the same version?"
        ) from error
