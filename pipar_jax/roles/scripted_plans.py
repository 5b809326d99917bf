"""Plans given in advance, one per round: a measurement tries many of them in a single run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.roles.membership import Membership
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.moves import check_follows
from pipar_jax.schedule.plan import COORDINATOR, Plan
from pipar_jax.tuner.replanning import Offer


class ScriptedPlans:
    """A replacement for ``Adaptation``: each round has its own plan.

    Each plan is compiled between the rounds, while nothing else runs, so that all rounds are alike.

    Args:
      plans: The plan of each round; the last plan stays in force.
      members: The devices and compute nodes.
      host: The host in this process.
      units: Number of the model's units.

    Raises:
      PlanError: A plan cannot follow its predecessor.
    """

    def __init__(self, plans: Sequence[Plan], members: Membership, host: Host, units: int) -> None:
        for before, after in itertools.pairwise(plans):
            check_follows(before, after, units)
        self._plans, self._members, self._host = plans, members, host
        self._index = 0
        self.offers: tuple[Offer, Offer] | None = None

    def begin(self) -> None:
        """Does nothing: there is no thread to start."""

    def start_round(self, index: int) -> None:
        """Records that a round begins."""
        self._index = index

    def ready(self) -> Plan | None:
        """Returns the next round's plan, if it is another one, once every host has compiled it.

        Raises:
          PeerError: A device or node was lost or failed.
          RunError: A node refuses the plan.
        """
        if self._index + 1 >= len(self._plans):
            return None
        plan = self._plans[self._index + 1]
        if plan == self._plans[self._index]:
            return None
        self._members.broadcast(messages.CompileAhead(self._index, plan))
        self._host.prepare_ahead(self._index, plan)
        answers = self._members.collect(messages.Compiled, (COORDINATOR, *self._members.by_name))
        for mail in answers.values():
            if mail.said.refused is not None:
                raise RunError(mail.said.refused)
        return plan

    def changed(self, index: int) -> None:
        """Records that the plan is in force."""

    def close(self) -> None:
        """Does nothing: there is no thread to end."""
