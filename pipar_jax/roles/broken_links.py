"""Links between two hosts of a chain that have ended, while both hosts may still be there.

A host that dies ends all of its links, and its neighbours may report that before the coordinator
has noticed it. So a report counts once both ends have been there for a while longer. A report is
only a claim: if the other end does not confirm it, it is the reporter that goes.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from typing import NamedTuple

from pipar_jax.errors import PeerError
from pipar_jax.protocol.messages import NeighbourLost
from pipar_jax.schedule.plan import is_device, is_node, long_name


class _Break(NamedTuple):
    """A link that has ended.

    Attributes:
      reported: Its ends that have reported it.
      since_s: When the first did, on the monotonic clock.
      reason: Why it has ended, as the first said.
    """

    reported: set[str]
    since_s: float
    reason: str


class BrokenLinks:
    """Collects reports, and says which hosts the run goes on without.

    Args:
      patience_s: Seconds within which the loss of a host is noticed otherwise.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._breaks: dict[frozenset[str], _Break] = {}

    def add(self, source: str, said: NeighbourLost, members: Container[str]) -> str | None:
        """Takes the report of a host; returns why it is not a valid one, or None.

        Args:
          source: The host that reports it.
          said: The other end, and why the link has ended.
          members: The hosts that are there.
        """
        peer = said.peer
        if peer == source or not (is_node(source) or is_node(peer)):
            return f"'neighbour_lost' of {peer!r}, which is not its neighbour"
        if peer in members:  # otherwise its loss is the reason
            made = _Break(set(), time.monotonic(), said.reason)
            self._breaks.setdefault(frozenset((source, peer)), made).reported.add(source)
        return None

    def forget(self, *hosts: str) -> None:
        """Forgets what was reported of a link that is there again, or of a host that is gone.

        Args:
          *hosts: One end or both of them.
        """
        self._breaks = {ends: one for ends, one in self._breaks.items() if not ends >= set(hosts)}

    def due(self, members: Container[str]) -> Iterator[tuple[str, PeerError]]:
        """Yields hosts to go on without, each with the reason.

        Of a device and a compute node it is the device, since others need the node; of two nodes it
        is the one with the higher number.

        Args:
          members: The hosts that are there.
        """
        now_s = time.monotonic()
        for ends, found in list(self._breaks.items()):
            there = ends in self._breaks and all(end in members for end in ends)
            if there and now_s - found.since_s < self._patience_s:
                continue
            self._breaks.pop(ends, None)  # the loss of a host forgets all of its links
            if there:
                victim = max(found.reported, key=lambda name: (is_device(name), len(name), name))
                (other,) = ends - {victim}
                yield (
                    victim,
                    PeerError(
                        f"the link between {long_name(victim)} and {long_name(other)} has ended, "
                        f"although both are there: {found.reason}"
                    ),
                )
