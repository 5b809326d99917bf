"""Who is let in: devices and compute nodes that fit the configuration, each under its own name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from comms import Link, Message, PeerClosed
from pipar_jax.config import Config, Hosts
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol import messages
from pipar_jax.roles import admission
from pipar_jax.roles.mail import Incoming, Member, try_send
from pipar_jax.roles.member_links import JOIN_S, MemberLinks
from pipar_jax.roles.population import Population
from pipar_jax.roles.refusals import Refusals
from pipar_jax.schedule.plan import is_node, long_name
from stages import Model


class Joining:
    """Admits strangers, or refuses them and tells the user so.

    Attributes:
      population: The devices that have registered, present or not.
      refusals: Counts who was refused.

    Args:
      config: Resolved configuration.
      model: The whole model.
      hosts: The hosts of the run.
      members: The present members by name.
      links: Their links.
      tell: Receives events.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        hosts: Hosts,
        members: Mapping[str, Member],
        links: MemberLinks,
        tell: OnEvent,
    ) -> None:
        self._config, self._model, self._hosts = config, model, hosts
        self._members, self._links, self._tell = members, links, tell
        self.population = Population()
        self.refusals = Refusals(tell)
        self._away_since_s: dict[str, float] = {}  # of lost compute nodes

    def take(self, what: Incoming, link: Link, item: Any) -> Member | None:
        """Takes mail of a stranger, of which all but a join ends its link.

        Args:
          what: The kind of mail.
          link: The stranger's link.
          item: What it sent in words, or why the link has ended by itself.

        Returns:
          Whom it may join as, to be introduced; else None.
        """
        if what is Incoming.MESSAGE:
            asked = self._links.take_join(link)
            return None if asked is None else self._admit(link, asked)
        known = self._links.drop(link)
        if what is Incoming.WRONG:
            self.refusals.add(None, link.address, f"it sent {item}")
        elif known and not isinstance(item, PeerClosed):
            self.refusals.add(None, link.address, str(item))
        return None

    def _admit(self, link: Link, message: Message) -> Member | None:
        """Returns the device or node that joins, or reports to it and to the user why not."""
        asked, reason = admission.read(message, self._config, self._model)
        name = getattr(asked, "name", None)
        if reason is None and name != link.peer:  # whose certificate and token were checked
            reason = f"it joins as {name!r}, but its link is that of {link.peer!r}"
        taken = reason is None and name in self._members
        if taken:  # or it has returned before its loss was noticed
            reason = f"{long_name(str(name))} has joined already: start it with another index"
        if reason is not None or asked is None:
            self.refuse(link, name, reason or "it did not ask to join", again=taken)
            return None
        return Member(link, admission.identity(asked))

    def introduce(self, member: Member) -> None:
        """Gives a new member what it needs to begin, and tells of it."""
        who, now_s = member.identity, time.monotonic()
        self._links.admit(member.link, who.name)
        kind = "node" if is_node(who.name) else "device"
        joined: JsonObject = {"event": f"{kind}_joined", kind: who.index}
        if is_node(who.name):
            try_send(member.link, messages.ModelFacts(self._model.signature))
            since_s = self._away_since_s.pop(who.name, None)
            away_s = None if since_s is None else now_s - since_s
        else:
            member.link.set_shape(self._hosts[who.name].down)
            away_s = self.population.join(who, now_s)
            joined["samples"] = who.samples
        if away_s is not None:
            joined |= {"event": f"{kind}_returned", "away_s": away_s}
        self._tell(joined)

    def refuse(self, link: Link, name: str | None, reason: str, *, again: bool = False) -> None:
        """Reports to an unknown peer and to the user why it is refused, and ends its link.

        Args:
          link: Its link.
          name: The name that it gave, if it is the name of a host of the run.
          reason: Why, on a single line.
          again: Whether it may try again.
        """
        self.refusals.add(name, link.address, reason)
        try_send(link, messages.Refused(reason, again))
        self._links.refuse(link, reason)

    def refuse_late(self) -> None:
        """Refuses the strangers that have not asked to join in time."""
        for link in self._links.late():
            self.refuse(link, None, f"it did not ask to join within {JOIN_S:g} s")

    def note_node_lost(self, name: str) -> None:
        """Records since when a compute node is away."""
        self._away_since_s[name] = time.monotonic()
