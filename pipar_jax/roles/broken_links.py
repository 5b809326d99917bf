"""Links between two hosts of a chain that have ended, while both hosts are still there.

Hosts only report that a link has ended, and whether they have ended it for what came over it. Who
goes is decided here, from both ends, and not by who spoke first:

1. A node whose links to at least two neighbours have ended, and to more than half of all that it
   was ever told to meet, goes: it is what these links have in common.
2. Of a device and a node the device goes, since others need the node: at once if the node has ended
   the link for what the device sent, otherwise after a while.
3. Of two nodes the one goes that alone is accused of what it sent. If neither is, or both are, it
   is the one with the higher number if both report the end, otherwise the one that reports it.

So a device that lies goes itself, whatever it says or leaves out, and takes a node with it only
together with a majority of that node's neighbours. A node that lies costs at most half of its
neighbours before it goes.

A host that dies ends all of its links, and its neighbours may report that before the coordinator
has noticed it. So a report counts only while both ends are there, and once they have been there for
a while longer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Container, Iterator, Sequence
from typing import TypeAlias

from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.protocol.messages import NeighbourLost
from pipar_jax.schedule.plan import Boundary, is_device, is_node, long_name

#: The names of the two hosts of a link.
Ends: TypeAlias = frozenset[str]


@dataclasses.dataclass
class _Break:
    """A link that has ended.

    Attributes:
      since_s: When the first of its ends reported it, on the monotonic clock.
      reasons: Why it has ended, as each end says that has reported it.
      faults: The ends that have ended it for what the other one sent.
    """

    since_s: float
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: set[str] = dataclasses.field(default_factory=set)


class BrokenLinks:
    """Knows who was told to meet whom, collects reports, and says whom the run goes on without.

    Args:
      patience_s: Seconds within which the loss of a host is noticed otherwise.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._breaks: dict[Ends, _Break] = {}
        # Links that hosts of this moment have, or were told to open.
        self._asked: set[Boundary] = set()
        # Names alone, of the whole run: whoever comes back brings no clean record.
        self._neighbours: dict[str, set[str]] = {}
        self._judged: dict[str, set[str]] = {}  # whose links with a node have ended before
        self._over = False

    def ask(self, boundaries: Sequence[Boundary]) -> tuple[Boundary, ...]:
        """Records that hosts are told to meet.

        Args:
          boundaries: The boundaries of their links.

        Returns:
          Those of which an end is new since they met, or has reported the link's end: what is left
          of an earlier link does not count, even if an end has not noticed that it is dead.
        """
        anew = tuple(
            one for one in boundaries if one not in self._asked or _ends(one) in self._breaks
        )
        self._asked.update(boundaries)
        for one in boundaries:
            self._neighbours.setdefault(one.lower, set()).add(one.upper)
            self._neighbours.setdefault(one.upper, set()).add(one.lower)
        return anew

    def note_met(self, source: str, anew: Collection[Boundary]) -> None:
        """Forgets which links a host had reported as ended, once it has met these ends anew.

        That one has sent what it may not is not forgotten.
        """
        for one in anew:
            found = self._breaks.get(_ends(one))
            if found is None or source in found.faults:
                continue
            found.reasons.pop(source, None)
            if not found.reasons:
                del self._breaks[_ends(one)]

    def add(self, source: str, said: NeighbourLost, members: Container[str]) -> str | None:
        """Takes the report of a host; returns why it is not a valid one, or None.

        Args:
          source: The host that reports it.
          said: The other end, and why the link has ended.
          members: The hosts that are there.
        """
        peer, ends = said.peer, Ends((source, said.peer))
        if peer not in self._neighbours.get(source, ()):
            return f"'neighbour_lost' of {peer!r}, which is not its neighbour"
        # Otherwise the loss of the other end is the reason, even if it is back by now.
        if not self._over and peer in members and any(_ends(one) == ends for one in self._asked):
            found = self._breaks.setdefault(ends, _Break(time.monotonic()))
            found.reasons.setdefault(source, said.reason)
            if said.fault and source not in found.faults:
                found.faults.add(source)
                found.reasons[source] = said.reason
        return None

    def forget(self, host: str) -> None:
        """Forgets the links of a host that is gone, and what was reported of them."""
        self._breaks = {ends: one for ends, one in self._breaks.items() if host not in ends}
        self._asked = {one for one in self._asked if host not in one[:2]}

    def finish(self) -> None:
        """Gives no verdict from now on: hosts end one after another, and others see it first."""
        self._over = True
        self._breaks.clear()

    def due(self, members: Container[str]) -> Iterator[tuple[str, PeerError]]:
        """Yields hosts to go on without, each with the reason.

        The reason is a ``ProtocolError`` if the host is accused of what it sent.

        Args:
          members: The hosts that are there.
        """
        while self._breaks and (found := self._verdict(members)) is not None:
            self.forget(found[0])
            yield found

    def _verdict(self, members: Container[str]) -> tuple[str, PeerError] | None:
        """Returns the first host that goes, and why; None if nothing has to be decided now."""
        now_s = time.monotonic()
        self._breaks = {
            ends: one for ends, one in self._breaks.items() if all(end in members for end in ends)
        }
        ripe = {
            ends: one
            for ends, one in self._breaks.items()
            if now_s - one.since_s >= self._patience_s or _is_clear(ends, one)
        }
        for ends, found in ripe.items():
            nodes = sorted(filter(is_node, ends), key=_number, reverse=True)
            for node in nodes:
                if self._is_common(node, ripe):
                    return self._common_end(node, ripe)
            # What is still pending may show what they have in common.
            if not any(self._is_common(node, self._breaks) for node in nodes):
                for node in nodes:
                    self._judged.setdefault(node, set()).update(ends - {node})
                victim = _victim(ends, found)
                return victim, _error(victim, ends, found)
        return None

    def _is_common(self, node: str, breaks: Collection[Ends]) -> bool:
        """Returns whether too many of a node's links have ended, some of them before."""
        ended = self._ended(node, breaks)
        return len(ended) >= 2 and 2 * len(ended) > len(self._neighbours[node])

    def _ended(self, node: str, breaks: Collection[Ends]) -> set[str]:
        """Returns the neighbours whose links with a node have ended."""
        found = {other for ends in breaks if node in ends for other in ends - {node}}
        return found | self._judged.get(node, set())

    def _common_end(self, node: str, ripe: dict[Ends, _Break]) -> tuple[str, PeerError]:
        """Returns a node that is the end of too many broken links, and why it goes."""
        ended = self._ended(node, ripe)
        self._judged[node] = ended
        names = ", ".join(map(long_name, sorted(ended, key=_number)))
        reason = next(_reason(node, one) for ends, one in ripe.items() if node in ends)
        return node, PeerError(
            f"the links of {long_name(node)} to {len(ended)} of its "
            f"{len(self._neighbours[node])} neighbours ({names}) have ended, although all were "
            f"there: {reason}"
        )


def _ends(boundary: Boundary) -> Ends:
    return Ends(boundary[:2])


def _number(name: str) -> tuple[int, str]:
    """Returns a key that orders nodes by their numbers."""
    return len(name), name


def _is_clear(ends: Ends, found: _Break) -> bool:
    """Returns whether a node has ended the link for what a device sent: nothing is awaited."""
    return any(map(is_device, ends)) and any(map(is_node, found.faults))


def _victim(ends: Ends, found: _Break) -> str:
    """Returns which end of a link goes: rules 2 and 3."""
    for end in ends:
        if is_device(end):
            return end
    if len(found.faults) == 1:
        (accused,) = ends - found.faults
        return accused
    return max(found.reasons, key=_number)


def _reason(victim: str, found: _Break) -> str:
    """Returns why a link has ended: what the other end accuses a host of, if it does."""
    by = next((one for one in found.reasons if one in found.faults and one != victim), None)
    return next(iter(found.reasons.values())) if by is None else found.reasons[by]


def _error(victim: str, ends: Ends, found: _Break) -> PeerError:
    """Returns the reason for going on without an end of a link."""
    (other,) = ends - {victim}
    if other in found.faults:
        return ProtocolError(f"{long_name(victim)} sent {long_name(other)} {found.reasons[other]}")
    return PeerError(
        f"the link between {long_name(victim)} and {long_name(other)} has ended, although both "
        f"are there: {_reason(victim, found)}"
    )
