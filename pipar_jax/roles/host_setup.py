"""Brings hosts to a plan: they meet, prepare, time themselves, and change to another plan."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config
from pipar_jax.protocol import messages
from pipar_jax.roles import replan
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.base_files import BaseFile
from pipar_jax.roles.checkpoints import Checkpoints
from pipar_jax.roles.conductor import Conductor
from pipar_jax.roles.gathering import Gathering
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_copies import NodeCopies
from pipar_jax.roles.node_pool import NodePool
from pipar_jax.roles.population import Population
from pipar_jax.roles.prepared_steps import PreparedSteps
from pipar_jax.roles.private_rounds import PrivateRounds
from pipar_jax.roles.run_log import RunLog
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.timetable import Timetable, Turn
from pipar_jax.runtime import memory
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.link_table import direct
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Boundary,
    Order,
    Plan,
    device_name,
    host_index,
    is_device,
    is_node,
)
from pipar_jax.tuner.replanning import Offer
from stages import Model


def samples_by_place(population: Population, places: int, *, sampled: bool) -> tuple[int, ...]:
    """Returns the samples of an epoch in each place; of those not known, as many as any has.

    Args:
      population: The devices that have joined.
      places: How many places a cohort has.
      sampled: Whether any device may take any place.
    """
    most = max(one.samples for one in population)
    if sampled:
        return (most,) * places
    known = {one.index: one.samples for one in population}
    return tuple(known.get(place, most) for place in range(places))


class HostSetup:
    """The devices and compute nodes under the plan in force.

    Attributes:
      plan: The plan in force.
      plans: The plans under which hosts may have done what they report.
      samples: Samples of an epoch in each place.
      ever_met: The boundaries whose links may have been opened during the run.

    Args:
      config: Resolved configuration.
      model: The whole model.
      plan: The plan that the run begins with.
      samples: Samples of an epoch in each place.
      table: Who takes which steps.
      prepared: How many steps each host was told of.
      host: The host in this process.
      members: The devices and compute nodes.
      pool: The compute nodes that are ready.
      gathering: The devices that are ready.
      checkpoints: Knows the data of devices.
      private: Knows what private devices have released.
      holdings: The contents of bundles.
      conductor: Conducts rounds under the plan in force.
      run_log: Takes what is told.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        plan: Plan,
        samples: tuple[int, ...],
        table: Timetable,
        prepared: PreparedSteps,
        host: Host,
        members: Membership,
        pool: NodePool,
        gathering: Gathering,
        checkpoints: Checkpoints,
        private: PrivateRounds,
        holdings: Holdings,
        conductor: Conductor,
        run_log: RunLog,
    ) -> None:
        self._config, self._model, self._table, self._host = config, model, table, host
        self._prepared_steps = prepared
        self._members, self._pool, self._gathering = members, pool, gathering
        self._checkpoints, self._private, self._holdings = checkpoints, private, holdings
        self._conductor, self._run_log = conductor, run_log
        self._population = members.population
        self._places, self._sampled = members.hosts.places, members.hosts.sampled
        self.plan, self.samples = plan, samples
        self.plans: tuple[Plan, ...] = (plan,)
        self._base = BaseFile(config, COORDINATOR, model)
        self._met: set[Boundary] = set()
        self._meetings = 0
        self.ever_met: set[Boundary] = set()
        self._joining: list[str] | None = None
        self._prepared = False

    @property
    def workers(self) -> tuple[str, ...]:
        """The compute nodes and devices that are there, but for those that are held."""
        there = (*self._pool.ready, *self._population.present())
        return tuple(name for name in there if name not in self.held)

    @property
    def idle(self) -> tuple[str, ...]:
        """The compute nodes and devices that have nothing to do between two rounds."""
        return (*self._pool.ready, *(device_name(one.device) for one in self._population.ready()))

    @property
    def held(self) -> tuple[str, ...]:
        """Hosts that have joined while the plan changes, and wait until it has."""
        return tuple(self._joining or ())

    def hold(self) -> None:
        """Lets whoever joins from now on wait."""
        self._joining = []

    def welcome_held(self) -> None:
        """Lets those that have waited prepare."""
        joining, self._joining = self._joining or [], None
        for name in dict.fromkeys(joining):
            if name in self._members.by_name:
                self.welcome(name)

    def forget_links(self, name: str) -> None:
        """Records that a host is gone, whose neighbours have to meet it anew."""
        self._met = {boundary for boundary in self._met if name not in boundary[:2]}

    def prepare(self, aggregator: Aggregator) -> None:
        """Sends the plan, waits until all have compiled, and lets slow hosts time themselves.

        Args:
          aggregator: The coordinator's, which is compiled meanwhile.
        """
        workers = self.workers
        self._expect(self.plan)
        self._members.joined = self.welcome  # whoever comes from now on is prepared by itself
        for name in self._members.hosts.nodes:  # who came while the plan was made
            if name in self._members.by_name and name not in self._pool.ready:
                self.welcome(name)
        self.introduce(self.plan)
        for name in (COORDINATOR, *workers):
            self._warn(name)
        began = time.monotonic()
        self._members.working("compiling")
        for name in workers:
            self._members.send(name, self.preparation(name))
        prepare = self.preparation(COORDINATOR)
        self._host.prepare(self.plan, prepare.samples, prepare.steps)
        if self.plan.order == Order.PARALLEL:
            aggregator.compile()
            aggregator.broken_units()  # compiles what finds them, too
            self._private.compile(aggregator.params)
        ready = self._members.collect(messages.Prepared, (COORDINATOR, *workers))
        compile_s = time.monotonic() - began
        self.calibrate((COORDINATOR, *workers))
        seconds = time.monotonic() - began - compile_s
        needs = {name: mail.said.memory_bytes for name, mail in ready.items()}
        for name in ready:
            if is_device(name):  # all begin with the weights of the seed
                one = self._population[host_index(name)]
                one.ready = one.current = True
        self._prepared = True
        self._run_log.prepared(compile_s, seconds, needs)

    @property
    def base_digests(self) -> tuple[str, ...]:
        """For each unit the digest of its weights in the base file; see ``BaseFile.digests``."""
        return self._base.digests

    def preparation(self, name: str) -> messages.Prepare:
        """Returns what a host is told of the plan."""
        steps = self._prepared_steps.of(name)
        return messages.Prepare(
            self.plan,
            self.samples,
            tuple(self._table.steps(one) for one in steps),
            self._checkpoints.run,
            self.base_digests,
        )

    def welcome(self, name: str) -> None:
        """Lets a host that has come in the midst of the run prepare its share of the plan."""
        if self._joining is not None:
            self._joining.append(name)
            return
        if is_node(name):
            self._admit_bundles((self.plan,), name)
            self._warn(name)
            self._members.send(name, self.preparation(name))
            self._pool.preparing.add(name)
            return
        who = self._members.by_name[name].identity
        if not self._checkpoints.knows_data(name, who.fingerprint):
            self._members.blame(name, "a join with other samples than those it trained with before")
            return
        if (why_not := self._private.admit(who)) is not None:
            self._members.blame(name, f"a join without its past: {why_not}")
            return
        self._admit_bundles((self.plan,), name)
        if not self._sampled:
            self.samples = samples_by_place(self._population, self._places, sampled=False)
        self._warn(name)
        self._members.send(name, self.preparation(name))
        self._gathering.prepares(name)

    def _expect(self, *plans: Plan) -> None:
        """Takes from members what the last of some plans has for them, and nothing larger.

        Args:
          *plans: The plan in force, and the one that is changed to.
        """
        self._members.links.acceptance = Acceptance(
            self._model, plans[-1], COORDINATOR, samples=self.samples,
            batch_size=self._config.data.batch_size, lengths=self._host.share.lengths,
        )  # fmt: skip
        for name in self.workers:
            self._admit_bundles(plans, name)

    def _admit_bundles(self, plans: Sequence[Plan], name: str) -> None:
        """Lets a member send its largest bundle and tensor under some plans, and nothing larger."""
        assert self._members.links.acceptance is not None
        seat = self._members.hosts.first_seat(name)
        tensor_bytes = self._members.links.acceptance.tensor_bytes(seat)
        steps = max(one.steps for one in self._population)
        turns = [Turn(place, 0, steps) for place in range(self._places)]
        widest = self._table.spans(self._table.widest, turns)
        self._members.by_name[name].link.admit(
            self._holdings.allowance(plans, seat, [widest], tensor_bytes)
        )

    def _warn(self, name: str) -> None:
        """Tells if a host may have too little memory to compile its share of the plan."""
        reason = memory.cold_start_excess(self._model, self.plan, self._members.hosts, name)
        if reason is not None:
            self._members.tell({"event": "cold_start", "host": name, "reason": reason})

    def introduce(self, plan: Plan) -> None:
        """Lets neighbours in chains connect to each other, where a plan needs it.

        If one of them is lost meanwhile, the others are asked anew: they would wait for it.
        """
        while True:
            # Before the first plan is prepared nobody is idle, and all meet that have not been told
            # to prepare. Later some may prepare, or train what they were late with: they meet then.
            joining = self._gathering.preparing
            new = tuple(name for name in self.workers if name not in joining)
            asked = self.idle if self._prepared else new
            here = {COORDINATOR, *asked}
            boundaries = [
                one
                for one in direct(plan.boundaries())
                if here.issuperset(one[:2]) or one in self._met
            ]
            if self._met.issuperset(boundaries):
                return
            if self._meet(boundaries, asked):
                self._met.update(boundaries)
                return

    def _meet(self, boundaries: Sequence[Boundary], workers: Sequence[str]) -> bool:
        """Asks all to connect; returns whether all neighbours have, and none was lost meanwhile."""
        known = {name: self._members.by_name[name].identity.address for name in self._pool.ready}
        addresses = {name: address for name, address in known.items() if address is not None}
        neighbours = {name for one in boundaries for name in one[:2]}
        self._meetings += 1
        self.ever_met.update(boundaries)  # some may have met before another one was lost
        links, told = self._members.broken_links, {COORDINATOR, *workers}
        anew = links.ask([one for one in boundaries if told.issuperset(one[:2])])
        meet = messages.Meet(self._meetings, tuple(boundaries), addresses, anew)
        for name in workers:
            self._members.send(name, meet)
        waiting, there = set(workers), self._members.by_name
        wait = self._members.waiting("met")
        while there.keys() >= neighbours - {COORDINATOR}:
            while found := self._members.early.take(messages.Met, waiting):
                for name, mail in found.items():
                    if mail.said.number == self._meetings:  # not of a meeting that was given up
                        waiting.discard(name)
                        links.note_met(name, anew)
            # Whoever is lost and back was not asked.
            waiting = {name for name in waiting if self._members.owes(name, messages.Met)}
            if not waiting.intersection(there):
                return True
            wait.look(sorted(waiting.intersection(there)))
        return False

    def calibrate(self, names: Sequence[str]) -> None:
        """Lets each emulated slow host time its functions, one after another, all else idle."""
        for name in names:
            if name == COORDINATOR and self._config.server.slowdown != 1.0:
                self._host.calibrate()
                self._members.collect(messages.Calibrated, (COORDINATOR,))
            elif name != COORDINATOR and self._members.hosts[name].slowdown.emulated:
                self._members.send(name, messages.Calibrate())
                self._members.collect(messages.Calibrated, (name,))

    def begin_schedules(self, names: Sequence[str]) -> None:
        """Lets the rates of emulated links change from now on, where they do."""
        for name in names:
            if is_device(name) and name in self._members.by_name:
                down = self._members.hosts[name].down
                if down.schedule:
                    self._members.by_name[name].link.set_shape(down)

    def change(
        self,
        plan: Plan,
        index: int,
        states: StateExchange,
        aggregator: Aggregator,
        copies: NodeCopies,
        *,
        offers: tuple[Offer, Offer] | None = None,
        without: Collection[str] = (),
    ) -> None:
        """Lets all hosts change to a plan that they have compiled, between two rounds.

        Args:
          plan: The plan.
          index: The first round under it.
          states: Moves states between the hosts.
          aggregator: The coordinator's.
          copies: What is left of hosts that are gone.
          offers: What the old and the new plan were predicted to take, if that is why.
          without: Hosts that are there, but what they have counts as lost.

        Raises:
          PeerError: A host was lost, and the run cannot go on without it.
          RunError: This process failed, or a host sent states that do not fit the model.
        """
        began = time.monotonic()
        self.introduce(plan)
        workers = self.workers
        self._expect(self.plan, plan)
        replan.conduct(
            self._members, workers, states, self.plan, plan, aggregator, copies, index, without
        )
        moved_s = time.monotonic() - began
        # Whoever was out of the last round tells of what it did under the plan before, too.
        before = self.plans if self._members.hosts.may_lose_nodes else (self.plan,)
        self.plan, self.plans = plan, tuple(dict.fromkeys((*before, plan)))
        self._conductor.plan = plan
        # Stages that an emulated slow host has not run before.
        self.calibrate((COORDINATOR, *self.workers))
        self._run_log.replanned(index, plan, moved_s, offers)
