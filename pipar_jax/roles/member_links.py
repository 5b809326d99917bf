"""The links of devices and compute nodes up to their mail: whose they are, and what is taken."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comms import Link, Message, MessageKind
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage, Form, kind_of
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.holdings import SURVEYED
from pipar_jax.roles.mail import Incoming, Mail, Member
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR

#: Seconds within which a new link must ask to join.
JOIN_S = 30.0
#: Limits of a host's unread messages and bytes; above the first limit, messages that only report
#: progress are discarded.
MANY, MOST_WAITING, MOST_WAITING_BYTES = 64, 4096, 64 << 20
_PASSING = {kind_of(kind) for kind in (messages.Progress, messages.Pulse)}


class _Waiting:
    """Unread mail of a link, and its deadline to join."""

    def __init__(self) -> None:
        self.messages = self.nbytes = 0
        self.until_s = time.monotonic() + JOIN_S
        self.ended = False
        self.join: Message | None = None  # what a stranger has asked, until it is read

    def add(self, message: Message, count: int) -> None:
        """Counts a message in, or out with -1; of bundles no bytes: they were asked for."""
        self.messages += count
        if message.kind == MessageKind.CONTROL:
            self.nbytes += count * message.nbytes


class MemberLinks:
    """Takes what arrives on links into the mail of the coordinator's thread, unread.

    A new link is only allowed to ask to join. A member may send the tensors that the plan has for
    it, bundles that it was asked for, and no more control messages than somebody reads.

    Attributes:
      mail: What has arrived, with its kind and its link.
      acceptance: Which tensors may arrive; without it none.
      seats: For each device of a round its name in the plan: its place in the cohort.

    Args:
      members: The present members by name.
      most_strangers: Number of links that may not have joined; the oldest makes room.
      tensors: Receives the tensors that arrive from devices; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        most_strangers: int,
        *,
        tensors: Callable[[Message], None],
        wake: Callable[[], None],
    ) -> None:
        self._members, self._most_strangers = members, most_strangers
        self._tensors, self._wake = tensors, wake
        self.mail: queue.SimpleQueue[tuple[Incoming, Link | None, Any]] = queue.SimpleQueue()
        self.acceptance: Acceptance | None = None
        self.seats: dict[str, str] = {}
        self._waiting: dict[Link, _Waiting] = {}
        self._names: dict[Link, str] = {}

    # --- on the threads of the host in this process -------------------------------------------

    def local_reply(self, said: ControlMessage, states: States) -> None:
        """Queues a reply of the host in this process."""
        self.mail.put((Incoming.REPLY, None, Mail(COORDINATOR, said, states, time.monotonic())))

    def local_failure(self, error: BaseException) -> None:
        """Queues the failure of the host in this process."""
        self.mail.put((Incoming.FAILED, None, error))

    # --- on the I/O thread --------------------------------------------------------------------

    def on_link(self, link: Link) -> None:
        """Registers a new connection."""
        # A copy: the owner's thread removes links meanwhile.
        strangers = [other for other in list(self._waiting) if other not in self._names]
        if len(strangers) >= self._most_strangers:
            self.end(strangers[0], "too many links have not joined")
            self.drop(strangers[0])
        self._waiting[link] = _Waiting()
        link.start(
            lambda message: self._route(link, message),
            self._wake,
            lambda error: self.mail.put((Incoming.LOST, link, error)),
        )

    def _route(self, link: Link, message: Message) -> None:
        """Routes an arriving message."""
        waiting = self._waiting.get(link)
        if waiting is None or waiting.ended:
            message.release()
            return
        name = self._names.get(link)
        reason = self._objection(waiting, name, message)
        if reason is not None:
            message.release()
            if name is not None and self._is_past(message):
                return
            self.end_for(link, reason)
        elif message.kind == MessageKind.TENSOR:
            self._tensors(message)
        elif waiting.messages < MANY or registry.peek(message) not in _PASSING:
            waiting.add(message, 1)
            if name is None:
                waiting.join = message  # it goes with its link, which may have to make room
            self.mail.put((Incoming.MESSAGE, link, None if name is None else message))

    def _is_past(self, message: Message) -> bool:
        """Returns whether it is a tensor of work that was abandoned while it was in transit."""
        if message.kind != MessageKind.TENSOR or message.tag is None or self.acceptance is None:
            return False
        return self.acceptance.is_past(message.tag)

    def _objection(self, waiting: _Waiting, name: str | None, message: Message) -> str | None:
        """Returns why a message is rejected unread, or None."""
        if name is None:
            asked = message.kind == MessageKind.CONTROL and not waiting.messages
            return None if asked else f"{_what(message)} before it was admitted, expected a join"
        if message.kind == MessageKind.TENSOR:
            if self.acceptance is None:
                return f"{_what(message)} before there is a plan"
            return self.acceptance.objection(self.seats.get(name, name), message)
        if waiting.messages >= MOST_WAITING or waiting.nbytes > MOST_WAITING_BYTES:
            return f"{waiting.messages} messages of {waiting.nbytes} bytes that are still unread"
        known = registry.peek(message)
        if message.kind != MessageKind.BUNDLE or known is None or known.form is Form.CONTROL:
            return None
        # Checked before it is read: bundles are large.
        asked = self._members[name].owed.expects(known.made)
        return None if asked else f"{known.name!r}, which was not requested"

    # --- on any thread --------------------------------------------------------------------------

    def end_for(self, link: Link, reason: str) -> None:
        """Ends a link for what came over it, and lets the owner know; any thread may call it."""
        self.end(link, reason)
        self.mail.put((Incoming.WRONG, link, reason))

    def end(self, link: Link, reason: str) -> None:
        """Ends a link and discards its unread mail; any thread may call it."""
        waiting = self._waiting.get(link)
        if waiting is not None:
            waiting.ended = True
        link.refuse(reason)

    # --- on the owner's thread ------------------------------------------------------------------

    def name_of(self, link: Link) -> str | None:
        """Returns the name of the member behind a link; None of a stranger."""
        return self._names.get(link)

    def take_join(self, link: Link) -> Message | None:
        """Returns what a stranger has asked; None if its link was lost before it was read."""
        waiting = self._waiting.get(link)
        if waiting is None:
            return None
        asked, waiting.join = waiting.join, None
        return asked

    def admit(self, link: Link, name: str) -> None:
        """Makes a stranger's link that of a member."""
        waiting = self._waiting.setdefault(link, _Waiting())
        self._names[link] = name  # first: what comes from now on is a member's
        waiting.messages, waiting.nbytes, waiting.until_s = 0, 0, float("inf")
        link.admit(SURVEYED)

    def note_read(self, link: Link, message: Message) -> None:
        """Records that a message has been read."""
        if (waiting := self._waiting.get(link)) is not None:
            waiting.add(message, -1)

    def drop(self, link: Link) -> bool:
        """Takes no more messages of a link; returns whether it was open."""
        return self._waiting.pop(link, None) is not None

    def forget(self, link: Link) -> None:
        """Forgets whose link it is as well: its end is not a loss."""
        self._names.pop(link, None)

    def open(self, spans: Sequence[Span], attempt: int, samples: Sequence[int]) -> None:
        """Accepts the tensors of an attempt at a round."""
        assert self.acceptance is not None
        self.acceptance.open(spans, attempt, samples)

    def drop_places(self, *places: int) -> None:
        """Rejects further tensors of some places in this attempt at a round."""
        assert self.acceptance is not None
        for place in places:
            self.acceptance.drop(place)

    def refuse(self, link: Link, reason: str) -> None:
        """Closes a stranger's link."""
        if (waiting := self._waiting.pop(link, None)) is not None:
            waiting.ended = True
        link.close(reason)

    def late(self) -> list[Link]:
        """Returns the links that have not asked to join in time."""
        now = time.monotonic()
        return [
            link for link, waiting in list(self._waiting.items())
            if link not in self._names and not waiting.ended and now > waiting.until_s
            and not waiting.messages  # it has asked, and nobody has had the time to read it
        ]  # fmt: skip


def _what(message: Message) -> str:
    """Returns a short description of a message."""
    if message.kind == MessageKind.TENSOR:
        return f"a tensor ({message.tag})"
    return f"a {message.kind} message"
