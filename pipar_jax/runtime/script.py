"""Plans given in advance, a round each: how a measurement tries many of them in one run."""

from __future__ import annotations

from collections.abc import Sequence

from pipar_jax.plan import COORDINATOR, Plan, device_name
from pipar_jax.runtime.adaptation import check_adaptable
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.members import Members
from pipar_jax.tuner.choice import Offer


class Script:
    """Stands in for ``Adaptation``: changes to the next of its plans before each round.

    Each plan is compiled between the rounds, while nothing else runs, so that all rounds are alike.

    Args:
      plans: The plan of the second round, of the third, and so on.
      members: The devices.
      host: The host in this process.

    Raises:
      PlanError: A plan is one that cannot change during a run.
    """

    def __init__(self, plans: Sequence[Plan], members: Members, host: Host) -> None:
        """See the class."""
        for plan in plans:
            check_adaptable(plan)
        self._plans, self._members, self._host = plans, members, host
        self._index = 0
        self.offers: tuple[Offer, Offer] | None = None

    def begin(self) -> None:
        """Looks at nothing."""

    def start_round(self, index: int) -> None:
        """Takes note of the round that begins."""
        self._index = index

    def ready(self) -> Plan | None:
        """Returns the next round's plan once every host has compiled it.

        Raises:
          PeerError: A device was lost or failed.
        """
        if self._index >= len(self._plans):
            return None
        plan = self._plans[self._index]
        devices = [device_name(device) for device in range(len(plan.devices))]
        body = {"type": "ahead", "number": self._index, "plan": plan.to_dict()}
        self._members.broadcast(body)
        self._host.prepare_ahead(self._index, plan)
        self._members.collect("ahead", (COORDINATOR, *devices))
        return plan

    def changed(self, index: int) -> None:
        """Takes note that the plan is in force."""

    def close(self) -> None:
        """Has nothing to end."""
