"""The link of each boundary: that to the coordinator, or a direct link between neighbours."""

from __future__ import annotations

from comms import Link
from pipar_jax.errors import RunError
from pipar_jax.protocol.values import DirectTiming, Timing
from pipar_jax.schedule.plan import COORDINATOR, Boundary


class LinkTable:
    """A host's links.

    Tensors to or from the coordinator's host use the link that every host has to
    it; every other boundary has a link of its own between the two neighbours.

    Attributes:
      host: The host's name in the plan.
      control: For each peer the link to or from the coordinator.

    Args:
      host: The host's name.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.control: dict[str, Link] = {}
        self._direct: dict[Boundary, Link] = {}
        self._ended: set[Boundary] = set()

    def add(self, boundary: Boundary, link: Link) -> None:
        """Adds a link to a neighbour for the tensors of a boundary, in place of an ended one."""
        self._direct[boundary] = link
        self._ended.discard(boundary)

    def end(self, boundary: Boundary) -> None:
        """Counts a boundary's link as missing; what is still sent over it reaches nobody.

        The link itself may take a while to end: its reason is sent first.
        """
        self._ended.add(boundary)

    def missing(self, boundaries: tuple[Boundary, ...]) -> list[Boundary]:
        """Returns this host's boundaries whose link is missing or has ended."""
        there = {one for one, link in self.direct() if link.error is None} - self._ended
        return [one for one in boundaries if self.host in one[:2] and one not in there]

    def direct(self) -> list[tuple[Boundary, Link]]:
        """Returns every direct link with its boundary, under earlier plans too."""
        return list(self._direct.items())  # at once: another thread may add one

    def timed(self) -> tuple[DirectTiming, ...]:
        """Returns the boundary and the back-to-back timing so far of each direct link."""
        stats = [(boundary, link.stats()) for boundary, link in self.direct()]
        return tuple(
            DirectTiming(boundary, Timing(one.timed_in_bytes, one.timed_in_s))
            for boundary, one in stats
        )

    def link_for(self, boundary: Boundary) -> Link:
        """Returns the link that carries the tensors of a boundary.

        Raises:
          RunError: There is none.
        """
        found = self._direct.get(boundary)
        peer = boundary.peer(self.host)
        if found is None and COORDINATOR in (peer, self.host):
            found = self.control.get(peer)
        if found is None:
            raise RunError(
                f"{self.host} has no link to {peer} for what leaves stage {boundary.below}"
            )
        return found


def direct(boundaries: tuple[Boundary, ...]) -> list[Boundary]:
    """Returns the boundaries that need a link of their own: neither side is the coordinator's."""
    return [one for one in boundaries if COORDINATOR not in (one.lower, one.upper)]


def dialler(boundary: Boundary) -> str:
    """Returns which side opens the link: the host below, or a device that is above.

    A device may be unreachable from other hosts.
    """
    return boundary.upper if boundary.upper[:1] == "d" else boundary.lower
