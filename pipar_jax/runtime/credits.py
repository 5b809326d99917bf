"""Credits of a host's links and limits on its stages, as its dispatcher asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.schedule.dispatch import CreditedLink, Demand, InFlightLimit
from pipar_jax.schedule.host_program import Operation
from pipar_jax.schedule.plan import Boundary


class Credits:
    """What a host's operations need before they may be dispatched.

    Args:
      link_table: The host's links.
      in_flight: Most micro-batches in flight at a stage whose weights are shared.
      sample_bytes: Bytes of a sample at each cut, as it crosses a link uncoded.
    """

    def __init__(self, link_table: LinkTable, in_flight: int, sample_bytes: Sequence[int]) -> None:
        self._link_table, self._in_flight, self._sample_bytes = link_table, in_flight, sample_bytes
        self._outgoing: dict[Boundary, CreditedLink] = {}
        self._limits: dict[int, InFlightLimit] = {}

    def demand_of(self, operation: Operation, samples: int) -> Demand | None:
        """Returns the credit and the limit that an operation of a size needs."""
        limit = link = None
        nbytes = 0
        if operation.limited:
            limit = self._limits.setdefault(operation.stage, InFlightLimit(self._in_flight))
        if (boundary := operation.target) is not None:
            if boundary not in self._outgoing:
                self._outgoing[boundary] = CreditedLink(self._link_table.link_for(boundary))
            link, nbytes = self._outgoing[boundary], self._sample_bytes[operation.cut] * samples
        if limit is None and link is None:
            return None
        return Demand(link, nbytes, limit)

    def forget_links(self) -> None:
        """Looks links up again: a device that came back has another one."""
        self._outgoing.clear()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of links' credit that dispatched operations hold."""
        return int(sum(link.reserved_bytes for link in self._outgoing.values()))

    @property
    def in_flight(self) -> int:
        """Micro-batches in flight at the stages that are limited."""
        return sum(limit.in_flight for limit in self._limits.values())
