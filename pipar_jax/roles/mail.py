"""Mail of the coordinator's thread: what members said, and whoever they are."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar, cast

from comms import ChannelError, Link, Message
from pipar_jax.protocol import registry
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.replies import Owed
from pipar_jax.runtime.unit_state import States

M = TypeVar("M", bound=ControlMessage)


class Incoming(enum.Enum):
    """Kinds of unread mail of the coordinator's thread, with the content of each."""

    REPLY = "mail of the host in this process"
    FAILED = "the exception that ended the host in this process, or the channel"
    MESSAGE = "a message of a link"
    WRONG = "why a link was ended: what its peer sent, in words"
    LOST = "why a link has ended by itself"


class Mail(NamedTuple, Generic[M]):
    """A message of a host.

    Attributes:
      source: The host's name.
      said: The message.
      states: States of units that came with it, if from the host in this process.
      time_s: When it was sent in this process or arrived, on the monotonic clock.
      message: The message as received over the link, if from a device or node.
    """

    source: str
    said: M
    states: States
    time_s: float
    message: Message | None = None


@dataclasses.dataclass
class Member:
    """A device or node that takes part in the run.

    Attributes:
      link: Its link.
      identity: Its reported identity.
      owed: The replies that it owes.
      steps: For each device whose last stage it runs, the last reported step of the round.
      broken: Its reports of non-finite values in the round: kind, device, step.
    """

    link: Link
    identity: Identity
    owed: Owed = dataclasses.field(default_factory=Owed)
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    broken: set[tuple[str, int | None, int]] = dataclasses.field(default_factory=set)


class Roll:
    """Hosts as they were at a moment: whoever is lost and back since is another member.

    A send, and a wait, may find that a host is lost and back: it knows nothing then of what the one
    before was to do. Iterating yields the names of those that are the same when they are reached.

    Args:
      members: The present members by name, now and later.
      names: Names of hosts; those that are not there are not on the roll.
    """

    def __init__(self, members: Mapping[str, Member], names: Iterable[str]) -> None:
        self._now = members
        self._then = {name: members[name] for name in names if name in members}

    def stayed(self, name: str) -> bool:
        """Returns whether a host was there at that moment and is the same member still."""
        return name in self._then and self._now.get(name) is self._then[name]

    def __iter__(self) -> Iterator[str]:
        """Yields the names of those that have stayed, each when it is reached."""
        return (name for name in self._then if self.stayed(name))


class EarlyMail:
    """Answers that have been read before anybody waits for them, in order of arrival."""

    def __init__(self) -> None:
        """Begins empty."""
        self._mail: list[Mail[ControlMessage]] = []

    def __iter__(self) -> Iterator[Mail[ControlMessage]]:
        """Iterates over a copy: the owner may take mail out meanwhile."""
        return iter(list(self._mail))

    def add(self, mail: Mail[ControlMessage]) -> None:
        """Adds an answer."""
        self._mail.append(mail)

    def take(self, kind: type[M], sources: Collection[str]) -> dict[str, Mail[M]]:
        """Takes the first answer of a kind of each of some hosts, where there is one."""
        taken: dict[str, Mail[M]] = {}
        for mail in self:
            if isinstance(mail.said, kind) and mail.source in sources and mail.source not in taken:
                self._mail.remove(mail)
                taken[mail.source] = cast(Mail[M], mail)
        return taken

    def discard(self, source: str, kinds: tuple[type, ...] = (ControlMessage,)) -> None:
        """Discards a host's answers, all or those of some kinds."""
        self._mail = [
            mail for mail in self._mail
            if mail.source != source or not isinstance(mail.said, kinds)
        ]  # fmt: skip


def try_send(link: Link, message: ControlMessage) -> None:
    """Sends a message over a link that may have ended."""
    try:
        registry.send(link, message)
    except ChannelError:
        return  # its loss is reported where it is waited for
