"""Puts a chain together again whose compute nodes are lost, or come back, between two rounds.

A run that replays a script (``cohort.script``) loses no node: one that the script has as lost stays
connected, and what it has counts as lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config
from pipar_jax.config.membership_script import NodeLosses
from pipar_jax.errors import PeerError, RunError
from pipar_jax.methods.registry import is_planned
from pipar_jax.methods.replacement import chain_nodes
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.checkpoint_store import Kept
from pipar_jax.roles.gathering import Gathering
from pipar_jax.roles.host_setup import HostSetup
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_copies import NodeCopies
from pipar_jax.roles.node_pool import NodePool
from pipar_jax.roles.run_log import FetchStats, RunLog
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.runtime import exchanges, moves, unit_state
from pipar_jax.runtime.unit_state import Key
from pipar_jax.schedule.plan import Plan, host_index, long_name, node_name


class ChainRepair:
    """Keeps copies of what is on nodes, and plans without those that are gone.

    Attributes:
      copies: What is left of lost nodes.
      noted: What the script says of nodes before the next attempt.

    Args:
      config: Resolved configuration.
      names: The model's units in order.
      aggregator: The coordinator's.
      members: The devices and compute nodes.
      pool: The nodes that are ready.
      gathering: The devices that are ready, and the script if one is replayed.
      setup: The hosts under the plan in force.
      states: Moves states between the hosts.
      run_log: Takes what is told.
      rounds: How many rounds are over.
    """

    def __init__(
        self,
        config: Config,
        names: Sequence[str],
        aggregator: Aggregator,
        members: Membership,
        pool: NodePool,
        gathering: Gathering,
        setup: HostSetup,
        states: StateExchange,
        run_log: RunLog,
        rounds: int,
    ) -> None:
        self._config, self._names, self._aggregator = config, names, aggregator
        self._members, self._pool, self._gathering = members, pool, gathering
        self._setup, self._states, self._run_log = setup, states, run_log
        self.copies = NodeCopies(config, names, aggregator, rounds)
        self.noted = NodeLosses()
        # A plan that was searched for depends on measured times: a replay cannot find it again.
        self._tells_plan = is_planned(config.method, config.pipeline) and not rounds

    def repair(self, index: int) -> None:
        """Plans without the nodes of the chain that are gone, until it is whole.

        Args:
          index: The round that begins then.

        Raises:
          PeerError: No chain fits the nodes that are left.
        """
        self._members.poll()  # who went between the rounds
        self.noted, begun_with = NodeLosses(), self._setup.plan
        self._check_replay(index)
        until_s = time.monotonic() + self._config.cohort.wait_s
        while lost := self._pool.missing(self._setup.plan):
            self._note(lost)
            self._setup.hold()
            try:
                reason = self._change_without(lost, index)
            finally:
                self._setup.welcome_held()
            if reason is not None and not self._await_node(until_s):
                raise PeerError(f"round {index + 1} cannot begin: {reason}")
        self._take_nodes(index)
        if self._setup.plan != begun_with or self._tells_plan:
            self._tells_plan = False
            self.noted = NodeLosses(self.noted.before, plan=self._setup.plan)

    def fetch(self, rounds: int, *, optimizers: bool) -> FetchStats:
        """Takes the parts of the model that live on nodes, for evaluation or as copies.

        Args:
          rounds: How many rounds are over.
          optimizers: Whether optimiser states are copied, too.
        """
        start_s = time.monotonic()
        pulled = self._states.pull(
            {
                name: self.copies.wanted(self._setup.plan, name, optimizers=optimizers)
                for name in self._pool.ready
                if name not in self._pool.forgotten
            }
        )
        for name, states in pulled.states.items():
            self.copies.take(states, rounds, name)
        return FetchStats(pulled.nbytes, time.monotonic() - start_s)

    def take_up(self, kept: Kept) -> None:
        """Takes up the copies that a checkpoint has.

        A node with stages that has given nothing to it was lost by then. It gets what is left of
        it before the next round, as one that is back before the chain is planned again.

        Args:
          kept: The checkpoint.
        """
        if "copies" not in kept.facts:
            return  # it is of before they were noted
        self.copies.recall(kept.facts["copies"], kept.tensors)
        lost = set(chain_nodes(self._setup.plan)).difference(kept.facts["nodes"])
        self._pool.forgotten |= lost.intersection(self._pool.ready)

    def end_attempt(self, index: int, losses: NodeLosses, *, whole: bool) -> None:
        """Records what an attempt at a round, or a script that is replayed, has lost of nodes.

        Args:
          index: The round.
          losses: What was lost in the attempt.
          whole: Whether the round is over.
        """
        planned = self._gathering.upcoming
        if self._gathering.replays:
            self._pool.forgotten |= {node_name(node) for node in losses.during}
        if planned is not None and whole:  # what was lost before copies were made
            self._pool.forgotten |= {
                node_name(node) for node, rounds in planned.nodes.before if rounds <= index
            }

    def _check_replay(self, index: int) -> None:
        """Loses what a script has as lost; whoever else is lost ends the replay.

        Raises:
          PeerError: A node with stages is gone, and the script does not say so.
          RunError: The script is of a run with other copies.
        """
        if not self._gathering.replays:
            return
        gone = [one for one in self._pool.missing(self._setup.plan)
                if one not in self._pool.forgotten]  # fmt: skip
        if gone:
            raise PeerError(
                f"{long_name(gone[0])} was lost, and cohort.script has it in round {index + 1}"
            )
        planned = self._gathering.upcoming
        for node, rounds in () if planned is None else planned.nodes.before:
            name = node_name(node)
            self._pool.forgotten.add(name)
            if (found := self.copies.rounds(self._held_by([name]))) != rounds:
                raise RunError(
                    f"cohort.script lost {long_name(name)} with copies of {rounds} rounds, and "
                    f"here they are of {found}: give the same nodes.replicate_every, "
                    "run.evaluate_every and checkpoint.every_rounds"
                )

    def _note(self, lost: Sequence[str]) -> None:
        """Notes for the script which nodes are lost before the attempt."""
        noted = {node for node, _ in self.noted.before}
        new = [
            (host_index(name), self.copies.rounds(self._held_by([name])))
            for name in lost
            if host_index(name) not in noted
        ]
        self.noted = NodeLosses((*self.noted.before, *new))

    def _change_without(self, lost: Sequence[str], index: int) -> str | None:
        """Changes to a plan without some nodes; returns why none fits, or None.

        Other hosts may be lost meanwhile: the chain need not be whole then.
        """
        wait = self._members.waiting("prepared")
        while busy := {*self._gathering.busy(), *self._pool.preparing}.difference(self._setup.held):
            wait.look(sorted(busy))
            self._take_nodes(index)
        if not self._pool.missing(self._setup.plan):
            return None
        plan = self._next_plan()
        if isinstance(plan, str):
            return plan
        forgotten = self._pool.forgotten
        if plan == self._setup.plan and forgotten:  # they are back in time
            self._refill(sorted(forgotten), index)
            forgotten.clear()
        elif self._pool.compile(plan, self._setup.workers) and not self._pool.absent(plan):
            salvaged = self.copies.salvaged(self._held_by(lost))
            self._setup.change(
                plan, index, self._states, self._aggregator, self.copies, without=forgotten
            )
            forgotten.clear()
            self._run_log.nodes_replaced(index, lost, salvaged)
        return None

    def _next_plan(self) -> Plan | str:
        """Returns the plan to go on with, or why there is none."""
        planned = self._gathering.upcoming
        if planned is not None:
            return planned.nodes.plan or self._setup.plan
        return self._pool.choose(self._setup.plan, self._setup.samples)

    def _await_node(self, until_s: float) -> bool:
        """Waits for a compute node to come, if the run is to wait; returns whether one has."""
        waits, wait = self._config.cohort.below != "end", self._members.waiting("joined")
        while waits and not self._pool.preparing and time.monotonic() < until_s:
            wait.look(())
        return bool(self._pool.preparing)

    def _take_nodes(self, index: int) -> None:
        """Takes nodes that have come and prepared; one with stages gets what is left of them."""
        for name in self._pool.settle():
            self._refill([name], index)
            self._setup.introduce(self._setup.plan)
            self._setup.calibrate([name])

    def _refill(self, nodes: Sequence[str], index: int) -> None:
        """Gives nodes what is left of the units that they have under the plan in force."""
        for name in nodes:
            if not (held := self._held_by([name])):
                continue
            wanted = exchanges.whole(self._setup.plan, name, self._names, optimizers=True)
            whole = {key: parts for key, parts in wanted.items() if key[0] == EVERY}
            states = unit_state.known(whole, self._aggregator)
            states |= {key: self.copies.optimizer(key) for key in wanted if key[0] != EVERY}
            self._states.push(name, states, messages.PushState(optimizers=True))
            self._members.collect(messages.PushedState, (name,))
            self._run_log.nodes_replaced(index, [name], self.copies.salvaged(held))

    def _held_by(self, nodes: Sequence[str]) -> list[Key]:
        """Returns the copies of units that are on some hosts under the plan in force."""
        held = moves.holders(self._setup.plan, len(self._names)).items()
        return [(copy, self._names[unit]) for (copy, unit), host in held if host in nodes]
