"""Unfinished connections of listeners, limited in total and per address."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from comms.errors import BusyError
from comms.options import Limits


class Unfinished(Protocol):
    """A connection during its handshake, or a link that is not admitted yet."""

    def turn_away(self, error: BusyError) -> None:
        """Ends the connection and sends the reason if that is possible without waiting."""


class Doorstep:
    """The unfinished connections of an endpoint's listeners; used by the I/O thread.

    A peer that opens many connections without finishing them only affects itself: beyond the limit
    per address the oldest of this address is closed, and beyond the total limit the oldest of the
    address with most. A regular peer finishes within a few round trips.

    Args:
      limits: Their maximum numbers.

    Attributes:
      expected: Maximum number of peers that the listeners expect.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.expected = 0
        self._by_address: dict[str, OrderedDict[Unfinished, None]] = {}
        self._address: dict[Unfinished, str] = {}

    def __len__(self) -> int:
        """Returns the number of unfinished connections."""
        return len(self._address)

    @property
    def addresses(self) -> int:
        """Number of addresses that have unfinished connections."""
        return len(self._by_address)

    @property
    def most_of_address(self) -> int:
        """Maximum number of one address."""
        return max(self._limits.address_handshakes, 2 * self.expected)

    def enter(self, connection: Unfinished, address: str) -> None:
        """Adds a connection and closes the oldest if there are too many."""
        here = self._by_address.setdefault(address, OrderedDict())
        here[connection] = None
        self._address[connection] = address
        if len(here) > self.most_of_address:
            self._turn_away(
                address, f"more than {self.most_of_address} unfinished connections from {address}"
            )
        elif len(self) > self._limits.pending_handshakes:
            crowd = max(self._by_address, key=lambda each: len(self._by_address[each]))
            self._turn_away(
                crowd, f"more than {self._limits.pending_handshakes} unfinished connections"
            )

    def leave(self, connection: Unfinished) -> None:
        """Forgets a connection that is finished or has ended."""
        address = self._address.pop(connection, None)
        if address is None:
            return
        here = self._by_address[address]
        del here[connection]
        if not here:
            del self._by_address[address]

    def _turn_away(self, address: str, why: str) -> None:
        oldest = next(iter(self._by_address[address]))
        self.leave(oldest)
        oldest.turn_away(BusyError(f"{why}, and this was the oldest"))
