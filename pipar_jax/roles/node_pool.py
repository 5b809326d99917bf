"""The compute nodes of a run: which are ready, and who takes over from those that are lost."""

from __future__ import annotations

from collections.abc import Sequence

from pipar_jax.config import Config
from pipar_jax.cost_model.profile import Profile
from pipar_jax.errors import PlanError
from pipar_jax.methods.replacement import chain_nodes, replacements
from pipar_jax.protocol import messages
from pipar_jax.roles.membership import Membership
from pipar_jax.runtime import memory, moves
from pipar_jax.runtime.host import Host
from pipar_jax.schedule.plan import COORDINATOR, Plan, long_name
from pipar_jax.tuner.chains import tune_chain
from stages import Model


class NodePool:
    """The nodes that are ready, and those that prepare their share of the plan.

    Attributes:
      ready: Names of the nodes that take part, with stages or as spares.
      preparing: Names of those that have joined in the midst of the run and prepare.
      forgotten: Names of those that are ready, but whose state counts as lost: in a script that is
        replayed, or since the checkpoint that the run goes on from has none of it.

    Args:
      config: Resolved configuration.
      model: The whole model.
      profile: The survey of hosts and links, if the plan is the planner's; None: it is given.
      members: The devices and compute nodes.
      host: The host in this process.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        profile: Profile | None,
        members: Membership,
        host: Host,
    ) -> None:
        self._config, self._model, self._members, self._host = config, model, members, host
        # Any device may take any place of a sampled cohort: what is on devices stays as it is.
        self._profile = None if config.cohort.size else profile
        self._refused: dict[Plan, str] = {}
        self._number = 0
        self.ready = [name for name in members.hosts.nodes if name in members.by_name]
        self.preparing: set[str] = set()
        self.forgotten: set[str] = set()

    def lose(self, name: str) -> None:
        """Records that a node is gone."""
        self.preparing.discard(name)
        if name in self.ready:
            self.ready.remove(name)

    def settle(self) -> list[str]:
        """Returns the nodes that have prepared since the last call: spares from now on."""
        found = list(self._members.early.take(messages.Prepared, self.preparing))
        self.preparing.difference_update(found)
        self.ready = [one for one in self._members.hosts.nodes if one in {*self.ready, *found}]
        return found

    def missing(self, plan: Plan) -> list[str]:
        """Returns the nodes with stages under a plan that are not ready, or count as lost."""
        lost = self.forgotten
        return [name for name in chain_nodes(plan) if name not in self.ready or name in lost]

    def absent(self, plan: Plan) -> list[str]:
        """Returns the nodes with stages under a plan that are not ready."""
        return [name for name in chain_nodes(plan) if name not in self.ready]

    def choose(self, present: Plan, samples: Sequence[int]) -> Plan | str:
        """Returns the plan to go on with over the nodes that are ready, or why there is none.

        The planner searches anew if the plan was its own; otherwise a spare node takes the place
        of a lost one, or a neighbour in the chain its units.

        Args:
          present: The plan in force.
          samples: Samples of an epoch in each place.
        """
        reason = ""

        def objection(plan: Plan) -> str | None:
            why = moves.why_not_follow(present, plan, len(self._model.units))
            why = why or self._refused.get(plan)
            return why or memory.why_not_fit(self._model, plan, self._config, samples)

        if self._profile is not None and self.ready:
            self._members.working("tuning")
            try:
                return tune_chain(self._profile, self._config, objection, self.ready).plan
            except PlanError as error:
                reason = str(error)
        for plan in replacements(present, self.ready):
            if (why := objection(plan)) is None:
                return plan
            reason = reason or why
        lost = " and ".join(map(long_name, self.missing(present)))
        left = ", ".join(self.ready) or "none"
        return (
            f"{lost} of the chain is gone, and no chain fits the compute nodes that are left "
            f"({left}){': ' if reason else ''}{reason}: configure more nodes (nodes.count), or let "
            "lost ones come back (network.rejoin_s, cohort.below=repeat, cohort.wait_s)"
        )

    def compile(self, plan: Plan, hosts: Sequence[str]) -> bool:
        """Lets hosts compile a plan; returns whether all that are left accept it.

        Raises:
          RunError: This process failed.
        """
        self._members.working("compiling")
        self._number += 1
        for name in hosts:
            self._members.send(name, messages.CompileAhead(self._number, plan))
        self._host.prepare_ahead(self._number, plan)
        answers = self._members.collect(messages.Compiled, (COORDINATOR, *hosts))
        for mail in answers.values():
            if mail.said.refused is not None:
                self._refused[plan] = mail.said.refused
        return plan not in self._refused
