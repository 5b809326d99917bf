"""Who stands at a listener's door: connections that are not finished, bounded by their address."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from comms.errors import BusyError
from comms.options import Limits


class Unfinished(Protocol):
    """A connection whose handshake is under way, or a link that nobody has admitted yet."""

    def turn_away(self, error: BusyError) -> None:
        """Ends it and tells the peer why, as far as that can be done at once."""


class Doorstep:
    """The unfinished connections of an endpoint's listeners; used by the I/O thread.

    Who opens many and finishes none only ever ends its own: the oldest from the same address loses
    when one too many stands there, and of the address that has most when there are too many in
    all. A peer that means it is done in a few round trips.

    Args:
      limits: How many there may be.

    Attributes:
      expected: Peers that the listeners have been told to expect, at most.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.expected = 0
        self._by_address: dict[str, OrderedDict[Unfinished, None]] = {}
        self._address: dict[Unfinished, str] = {}

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._address)

    @property
    def most_of_address(self) -> int:
        """How many of one address there may be."""
        return max(self._limits.address_handshakes, 2 * self.expected)

    def enter(self, one: Unfinished, address: str) -> None:
        """Takes in a connection and turns away the oldest if there are too many."""
        here = self._by_address.setdefault(address, OrderedDict())
        here[one] = None
        self._address[one] = address
        if len(here) > self.most_of_address:
            self._turn_away(
                address, f"more than {self.most_of_address} unfinished connections from {address}"
            )
        elif len(self) > self._limits.pending_handshakes:
            crowd = max(self._by_address, key=lambda each: len(self._by_address[each]))
            self._turn_away(
                crowd, f"more than {self._limits.pending_handshakes} unfinished connections"
            )

    def leave(self, one: Unfinished) -> None:
        """Forgets a connection that is finished or has ended."""
        address = self._address.pop(one, None)
        if address is None:
            return
        here = self._by_address[address]
        del here[one]
        if not here:
            del self._by_address[address]

    def _turn_away(self, address: str, why: str) -> None:
        oldest = next(iter(self._by_address[address]))
        self.leave(oldest)
        oldest.turn_away(BusyError(f"{why}, and this was the oldest"))
