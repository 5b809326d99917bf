"""When a run is kept on disk, what is kept of it, and how it is taken up again."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config, to_dict
from pipar_jax.errors import DiskError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.checkpoint_store import CheckpointStore, Kept
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_copies import NodeCopies
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.unit_state import States, Wanted
from pipar_jax.schedule.plan import COORDINATOR, Order, Plan, host_index, is_device, is_node


class Moment(NamedTuple):
    """A run between two rounds, as far as the coordinator's thread knows it.

    Attributes:
      rounds: How many rounds are over.
      plan: The plan in force.
      aggregator: The global weights and the state of the rule.
      copies: What compute nodes alone have, as it came last.
      client_model: In sequential order, the client-side model as it was handed back.
      facts: What else the coordinator takes up again, JSON-ready.
    """

    rounds: int
    plan: Plan
    aggregator: Aggregator
    copies: NodeCopies
    client_model: States
    facts: dict[str, Any]


class Restored(NamedTuple):
    """What a run has taken up.

    Attributes:
      client_model: In sequential order, the client-side model; otherwise nothing.
      fresh: Hosts that begin with fresh optimiser states.
    """

    client_model: States
    fresh: tuple[str, ...]


class Checkpoints:
    """Keeps a run on disk, in the background.

    Args:
      config: Resolved configuration.
      store: Where checkpoints go.
      run: The run's own name, which no other run has.
      model: What tells the model from others, JSON-ready.
      data: What tells the data of each host from others.
      tell: Takes events.
      higher_is_better: Whether higher values of ``checkpoint.best`` are better.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        run: str,
        model: Any,
        data: Mapping[str, str],
        tell: Callable[[dict[str, Any]], None],
        higher_is_better: bool = True,
    ) -> None:
        self._config, self._store, self.run, self._tell = config, store, run, tell
        self._data = dict(data)
        self._facts = {"run": run, "config": _plain_config(config), "model": model}
        self._first_seat = hosts_of(config).first_seat
        self._sampled, self._personal = config.cohort.size > 0, bool(config.aggregation.personal)
        self._on_server = config.checkpoint.device_state == "server"
        self._last_s = time.monotonic()
        self._rounds = -1
        self._owed: list[str] = []
        self._back_to: int | None = None  # the rounds of the checkpoint that the run goes on from
        self._taken_up: set[str] = set()  # the hosts that have gone back since
        self._sign = 1.0 if higher_is_better else -1.0

    @property
    def wanted(self) -> bool:
        """Whether checkpoints are written at all."""
        return bool(self._config.checkpoint.every_rounds or self._config.checkpoint.every_s)

    def knows_data(self, name: str, fingerprint: str) -> bool:
        """Takes note of a device's data; returns whether they are those that it had before."""
        return self._data.setdefault(name, fingerprint) == fingerprint

    def pulled_from(self, hosts: Sequence[str]) -> list[str]:
        """Returns the hosts whose optimiser states are pulled to the server."""
        return [name for name in hosts if self._on_server and not self._is_sampled(name)]

    def _is_sampled(self, name: str) -> bool:
        """Returns whether a host takes another place in every round, and begins fresh there."""
        return self._sampled and is_device(name)

    def check_space(self, nbytes: int) -> None:
        """Refuses to begin where the disk cannot hold the checkpoints that are to be kept.

        Args:
          nbytes: Bytes of the arrays of one.

        Raises:
          DiskError: It cannot.
        """
        if self.wanted:
            self._store.check_space(nbytes)

    def is_due(self, rounds: int) -> bool:
        """Returns whether a checkpoint is due after so many rounds."""
        one = self._config.checkpoint
        by_rounds = one.every_rounds and rounds % one.every_rounds == 0
        by_time = one.every_s and time.monotonic() - self._last_s >= one.every_s
        return bool(by_rounds or by_time)

    def take(
        self,
        moment: Moment,
        hosts: Sequence[str],
        states: StateExchange,
        members: Membership,
        score: Mapping[str, float],
    ) -> None:
        """Writes a checkpoint; a disk that takes none is told, and the run goes on.

        What is pulled of compute nodes for it is a copy of what they have, as for an evaluation.

        Args:
          moment: The run as it is.
          hosts: Devices and nodes that take part.
          states: Asks hosts for what they alone have.
          members: The devices and nodes.
          score: Loss and metrics of these weights, if they were evaluated.

        Raises:
          PeerError: A host was lost or failed.
        """
        if moment.rounds == self._rounds:
            return
        # Whoever is lost and back meanwhile has nothing of this moment.
        roll = members.roll(hosts)
        self.settle(members)
        began, names = time.monotonic(), tuple(moment.aggregator.params)
        keepers = [name for name in roll if not self._is_sampled(name)]
        pulled = states.pull(
            {name: self._wanted(moment.plan, name, names) for name in (COORDINATOR, *keepers)}
        )
        for name, some in pulled.states.items():
            if is_node(name):
                moment.copies.take(some, moment.rounds, name)
            else:
                whole = {key: one for key, one in some.items() if key[0] == EVERY}
                unit_state.take(moment.aggregator, whole, name)
        parts: exchanges.Parts = ("params", "state", "rule")
        known = unit_state.known({(EVERY, name): parts for name in names}, moment.aggregator)
        copied = moment.copies.optimizers(moment.plan)
        all_states = unit_state.merged(
            [known, moment.client_model, copied, *pulled.states.values()]
        )
        facts = {
            **self._facts, **moment.facts, "data": self._data, "rounds": moment.rounds,
            "plan": moment.plan.to_dict(),
            "on_server": self._on_server,
            "copies": moment.copies.facts(moment.plan),
            "nodes": [name for name in pulled.states if is_node(name)],
        }  # fmt: skip
        best = score.get(self._config.checkpoint.best)
        self._await_last()
        try:
            self._store.save(
                moment.rounds, unit_state.pack(all_states), facts,
                None if best is None or math.isnan(best) else self._sign * best,
            )  # fmt: skip
        except DiskError as error:
            self._tell(
                {"event": "checkpoint_failed", "rounds": moment.rounds, "reason": str(error)}
            )
            return
        self._rounds, self._last_s = moment.rounds, time.monotonic()
        if not self._on_server:
            for name in roll:
                own = self._personal or not self._is_sampled(name)
                if own and exchanges.keeps_optimizer(moment.plan, name):
                    members.send(name, messages.KeepState(self.run, moment.rounds))
                    self._owed.append(name)
        self._tell(
            {
                "event": "checkpoint",
                "rounds": moment.rounds,
                "seconds": time.monotonic() - began,
                "pulled_bytes": pulled.nbytes,
            }
        )

    def _await_last(self) -> None:
        """Waits until the checkpoint before is on the disk; tells if it could not be written."""
        try:
            self._store.wait()
        except DiskError as error:
            self._tell({"event": "checkpoint_failed", "rounds": self._rounds, "reason": str(error)})

    def _wanted(self, plan: Plan, name: str, names: Sequence[str]) -> Wanted:
        """Returns what is pulled of a host for a checkpoint."""
        wanted = exchanges.kept(plan, name, names, rule=True)
        here = name == COORDINATOR or self._on_server
        if not here or not exchanges.keeps_optimizer(plan, name):
            return wanted
        return exchanges.joined(wanted, exchanges.optimizer_states(plan, name, names))

    def restore(
        self,
        kept: Kept,
        plan: Plan,
        aggregator: Aggregator,
        hosts: Sequence[str],
        states: StateExchange,
        members: Membership,
    ) -> Restored:
        """Brings all hosts back to a checkpoint.

        Args:
          kept: The checkpoint.
          plan: The plan in force, which was in force then.
          aggregator: Takes the global weights and the state of the rule.
          hosts: Devices and nodes that take part.
          states: Moves states between the hosts.
          members: The devices and nodes.

        Raises:
          PeerError: A host was lost or failed.
          DiskError: Checkpoints that the run has left behind cannot be removed.
          RunError: A state does not fit the model.
        """
        names = tuple(aggregator.params)
        parts: exchanges.Parts = ("params", "state", "rule")
        whole = {(EVERY, name): parts for name in names}
        unit_state.take(aggregator, unit_state.unpack(kept.tensors, whole), "the checkpoint")
        own_disk, fresh, roll = [], [], members.roll(hosts)
        for name in itertools.chain((COORDINATOR,), roll):
            handed_on, seat = not exchanges.keeps_optimizer(plan, name), self._first_seat(name)
            here = name == COORDINATOR or handed_on
            if not self._is_sampled(name):
                here = here or kept.facts["on_server"]
            wanted = exchanges.whole(plan, seat, names, optimizers=here)
            there = states.are_in(kept.tensors, wanted)
            if not there:
                wanted = exchanges.whole(plan, seat, names, optimizers=False)
                self._tell_lost(name, _NOT_PULLED, optimizer=True)
            some = unit_state.unpack(kept.tensors, wanted)
            states.push(name, some, messages.PushState(optimizers=here and there))
            if not there or (self._is_sampled(name) and not handed_on):
                fresh.append(name)
            if not here and (self._personal or not self._is_sampled(name)):
                own_disk.append(name)
        members.collect(messages.PushedState, (COORDINATOR, *hosts))
        self._back_to = self._rounds = kept.rounds
        keepers = (name for name in roll if name in own_disk)
        fresh += self._restore_own(keepers, kept.rounds, members, optimizers=True)
        if later := self._store.leave_behind(kept.rounds):
            self._tell({"event": "checkpoints_removed", "rounds": later, "back_to": kept.rounds})
        fresh = [*dict.fromkeys(fresh)]
        if plan.order != Order.SEQUENTIAL:
            return Restored({}, tuple(fresh))
        wanted = exchanges.client_model(plan, 0, names)
        return Restored(unit_state.unpack(kept.tensors, wanted), tuple(fresh))

    def restore_personal(self, names: Sequence[str], rounds: int, members: Membership) -> None:
        """Lets devices that have come in the midst of the run have their personal weights back.

        Args:
          names: The devices, which have prepared.
          rounds: How many rounds are over.
          members: The devices and nodes.

        Raises:
          PeerError: A device was lost or failed.
        """
        for name in members.roll(names) if self._personal else ():
            # What one has of later rounds, and has not been told to go back from, the run does not
            # know any more.
            back_to = None if name in self._taken_up else self._back_to
            latest = rounds if back_to is None else back_to
            self._restore_own([name], latest, members, optimizers=False)

    def _restore_own(
        self, names: Iterable[str], rounds: int, members: Membership, *, optimizers: bool
    ) -> list[str]:
        """Lets hosts go back to what is on their disks; returns whose optimisers begin fresh."""
        asked, fresh = [], []
        for name in names:
            members.send(name, messages.RestoreState(self.run, rounds, optimizers))
            asked.append(name)
        found = members.collect(messages.RestoredState, asked)
        self._taken_up.update(found)
        for name, mail in found.items():
            missing, older = mail.said.missing, None
            if mail.said.personal is not None and is_device(name):
                older = _older(mail.said.personal, members.population[host_index(name)].last)
            if missing is not None:
                fresh.append(name)
            if reasons := [one for one in (missing, older) if one is not None]:
                lost = {"optimizer": missing is not None, "personal": older is not None}
                self._tell_lost(name, "; ".join(reasons), **lost)
        return fresh

    def _tell_lost(
        self, name: str, reason: str, *, optimizer: bool = False, personal: bool = False
    ) -> None:
        """Tells that a host goes on without its own state of the moment."""
        self._tell({"event": "state_lost", "host": name, "reason": reason,
                    "optimizer": optimizer, "personal": personal})  # fmt: skip

    def spread(
        self,
        plan: Plan,
        aggregator: Aggregator,
        hosts: Sequence[str],
        states: StateExchange,
        members: Membership,
    ) -> None:
        """Lets all hosts begin from the global weights; their optimiser states stay as they are.

        Raises:
          PeerError: A host was lost or failed.
        """
        names = tuple(aggregator.params)
        for name in (COORDINATOR, *hosts):
            wanted = exchanges.whole(plan, self._first_seat(name), names, optimizers=False)
            states.push(name, unit_state.known(wanted, aggregator), messages.PushState())
        members.collect(messages.PushedState, (COORDINATOR, *hosts))

    def settle(self, members: Membership) -> None:
        """Waits until hosts have kept their states, and tells of those that could not.

        Raises:
          PeerError: A host was lost or failed.
        """
        owed, self._owed = self._owed, []
        found = members.early.take(messages.KeptState, owed)
        # One that was lost meanwhile and has come back owes nothing.
        owing = [name for name in owed if members.owes(name, messages.KeptState)]
        found |= members.collect(messages.KeptState, owing)
        for name, mail in found.items():
            if mail.said.reason is not None:
                self._tell(
                    {"event": "state_not_kept", "host": name, "rounds": mail.said.rounds,
                     "reason": mail.said.reason}
                )  # fmt: skip

    def close(self) -> None:
        """Waits for what is being written; a disk that takes it not is told."""
        try:
            self._store.close()
        except DiskError as error:
            self._tell({"event": "checkpoint_failed", "rounds": self._rounds, "reason": str(error)})


#: Why a state that is in checkpoints is not in this one.
_NOT_PULLED = "the checkpoint has none of it, since it was at work, or away, at that moment"


def _older(rounds: int, last: int) -> str | None:
    """Returns what is lost of personal weights, or None.

    Args:
      rounds: How many rounds were over when they became what they are.
      last: How many were over when the device was last part of an average.
    """
    if rounds >= last:
        return None
    which = f"those after round {rounds}" if rounds else "those of the start"
    return f"its newest personal weights are {which}, and it has trained in round {last}"


def _plain_config(config: Config) -> dict[str, Any]:
    """Returns the configuration without its secret."""
    values = to_dict(config)
    values["network"]["token"] = None
    return values
