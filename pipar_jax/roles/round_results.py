"""What a round comes to: the average, what hosts have stored, and what devices have trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from comms import Encoded, decoded, encoded
from comms.arrays import Array
from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import Config
from pipar_jax.errors import ProtocolError
from pipar_jax.protocol import messages
from pipar_jax.roles.holdings import read_rows
from pipar_jax.roles.host_setup import HostSetup
from pipar_jax.roles.link_stats import odd_rows
from pipar_jax.roles.mail import Mail
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.private_rounds import PrivateRounds
from pipar_jax.roles.relay import Relay
from pipar_jax.roles.replies import end_replies
from pipar_jax.roles.round_attempt import Committed
from pipar_jax.roles.run_log import Round, RunLog
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.timetable import Timetable, next_steps
from pipar_jax.roles.told_sums import most_samples, odd_sums
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.metrics import Totals
from pipar_jax.schedule.actions import AGGREGATE, ALL, Action
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Order,
    device_name,
    host_index,
    is_device,
    long_name,
)
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.trace import Interval, Timed
from stages import Model


class RoundResults:
    """Averages and stores what the places of a round have trained.

    Attributes:
      demand: Seconds per step of each place, as last seen.

    Args:
      config: Resolved configuration.
      model: The whole model.
      host: The host in this process.
      members: The devices and compute nodes.
      setup: The hosts under the plan in force.
      relay: Has the client-side model in sequential order.
      aggregator: The coordinator's.
      states: Moves states between the hosts.
      table: Who takes which steps.
      private: What privacy asks of rounds.
      run_log: Takes what is told.
      demand: Seconds per step of each place to begin with.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        host: Host,
        members: Membership,
        setup: HostSetup,
        relay: Relay,
        aggregator: Aggregator,
        states: StateExchange,
        table: Timetable,
        private: PrivateRounds,
        run_log: RunLog,
        demand: list[float],
    ) -> None:
        self._config, self._model, self._host, self._members = config, model, host, members
        self._setup, self._relay, self._aggregator = setup, relay, aggregator
        self._states, self._table, self._private, self._run_log = states, table, private, run_log
        self._population, self._places = members.population, members.hosts.places
        self.demand = demand

    def average(self, done: Committed) -> None:
        """Averages what the places of a round trained and hands the result back to the hosts."""
        if self._setup.plan.order == Order.SEQUENTIAL:
            return
        names = self._model.unit_names
        copies: dict[int, Contribution] = {}
        plan = self._setup.plan
        brought = [
            name for name in done.hosts[1:] if exchanges.trained(plan, done.seat(name), names)
        ]
        for states in done.trained.values():
            for (copy, unit), one in states.items():
                own = copies.setdefault(copy, Contribution({}, {}, 1.0))
                own.params[unit], own.state[unit] = dict(one.params or {}), dict(one.state or {})
        if ALL in copies and done.places:  # the one copy that devices share: nothing to average
            self._aggregator.params.update(copies[ALL].params)
            self._aggregator.state.update(copies[ALL].state)
        batch_size = self._config.data.batch_size
        round_ = RoundSchedule(self._setup.plan, done.spans, self._setup.samples, batch_size)
        replicas, devices = [], []
        for span in done.spans:
            if span.stop > span.first and span.device in copies and span.device in done.places:
                weight = round_.trained_samples(span) if self._config.aggregation.weighted else 1
                replicas.append(copies[span.device]._replace(weight=float(weight)))
                devices.append(done.cohort[span.device])
        start_s = time.monotonic()
        replicas = self._private.arrive(self._aggregator.params, replicas, devices, done.index)
        self._aggregator.aggregate(replicas)
        # What was averaged is coded. Without a replica the weights are those that hosts were given
        # before: coded once more they might become others.
        mean = self._code_mean(self._config.aggregation.codec if replicas else "raw")
        if broken := self._aggregator.broken_units():
            last = max(span.stop for span in done.spans) - 1
            said = messages.NonFinite("average", None, done.index, last, broken)
            self._members.reports.report_broken(said)
        spent_s = time.monotonic() - start_s
        time.sleep(spent_s * (self._config.server.slowdown - 1.0))
        if done.spans:
            action = Action(0, AGGREGATE, ALL, done.spans[0].stop - 1)
            self._host.recorder.add(Timed(action, start_s, time.monotonic()))
        owed = end_replies(done.index, traced=self._config.run.trace != "none")
        why = messages.PushState(round=done.index)
        for name in done.roll:
            if name in brought:
                wanted = exchanges.averaged(plan, done.seat(name), names)
                self._members.send_bundle(name, why, unit_state.chosen(mean, wanted), *owed)
        here = unit_state.known(exchanges.averaged(plan, COORDINATOR, names), self._aggregator)
        self._states.push(COORDINATOR, here, why)

    def _code_mean(self, codec: str) -> dict[str, Array | Encoded]:
        """Returns the global weights of other hosts by name, coded as these hosts get them.

        The global weights are those that hosts hold: the aggregator has from now on what the others
        read of the code. So all have the same bits: who took part in the average, who is given the
        weights later, evaluations, checkpoints. What no other host holds stays as it is.

        Args:
          codec: Name of the codec.
        """
        plan, names = self._setup.plan, self._model.unit_names
        others = (name for name in plan.hosts() if name != COORDINATOR)
        wanted = exchanges.joined(*(exchanges.averaged(plan, name, names) for name in others))
        sent = encoded(unit_state.pack(unit_state.known(wanted, self._aggregator)), codec)
        coded = {name: one for name, one in sent.items() if isinstance(one, Encoded)}
        unit_state.amend(self._aggregator, unit_state.unpack(decoded(coded), wanted))
        return sent

    def store(self, done: Committed) -> None:
        """Waits until all hosts have stored what a round came to, and tells of it."""
        stored = self._members.collect(messages.Stored, done.hosts)
        interval = Interval(done.start_s, max(mail.time_s for mail in stored.values()))
        if self._setup.plan.order == Order.SEQUENTIAL:
            self._gather_sequential()
        traced = self._collect_traces([name for name in stored if name != COORDINATOR])
        rows, busy_s = self._host.recorder.take()
        self._run_log.add_trace(COORDINATOR, rows, 0.0)
        said = {name: mail.said for name, mail in stored.items()}
        counted = [device_name(done.cohort[place]) for place in done.places]
        self._private.ended(said, [name for name in counted if name in said])
        workers = [name for name in said if name != COORDINATOR]
        busy = {COORDINATOR: busy_s} | {name: said[name].busy_s for name in workers}
        for name in workers:
            if (odd := odd_rows(said[name].direct, name, self._setup.ever_met)) is not None:
                self._members.blame(name, odd)
        for one in said.values():  # none is longer than the round, whatever is said of it
            self._members.patience.action(min(one.longest_s, interval.seconds))
        self._run_log.end_round(
            Round(
                done.index,
                interval,
                totals=self._sum_up(done, said),
                busy=busy,
                overruns=sum(one.overruns for one in said.values()),
                told={name: said[name].link for name in workers},
                traced=traced,
                direct=[row for name in workers for row in said[name].direct],
                memory={name: one.memory for name, one in said.items()},
                taking=len(done.taking),
                committed=len(done.places),
                private=self._private.figures,
            )
        )
        for place in done.places:
            steps = sum(span.stop - span.first for span in done.spans if span.device == place)
            if steps and (name := device_name(done.cohort[place])) in busy:
                self.demand[place] = busy[name] / steps

    def _sum_up(self, done: Committed, said: Mapping[str, messages.Stored]) -> Totals:
        """Returns the sums over a round's samples, of those hosts that can have computed theirs.

        Raises:
          ProtocolError: A host that the run may not lose cannot.
        """
        totals, plan, batch_size = Totals(), self._setup.plan, self._config.data.batch_size
        for name, stored in said.items():
            if name != COORDINATOR:
                seat, places = done.seat(name), done.taking
                most = most_samples(plan, self._setup.samples, batch_size, seat, places)
                if (odd := odd_sums(self._model.task, stored, most)) is not None:
                    self._members.blame(name, f"'stored' with {odd}")
                    continue
            totals = totals.plus(Totals(stored.loss, stored.samples, stored.metrics))
        return totals

    def count(self, done: Committed) -> None:
        """Notes what each device has trained that counts, and who has the weights of the moment."""
        stops = next_steps(done.spans)
        here = {host_index(name) for name in done.roll if is_device(name)}
        for place, stop in stops.items():  # in turns also of one that was lost in a later turn
            self._population[done.cohort[place]].step = stop
        for place in done.places:
            one = self._population[done.cohort[place]]
            one.rounds += done.whole
            one.last = done.index + 1
            one.fresh = one.fresh and one.index not in here
        for one in self._population:
            if one.index in here:
                one.current = True
            elif done.places:
                one.current = False

    def _gather_sequential(self) -> None:
        """Takes the one copy of every unit: the client-side model as handed back, the rest here."""
        wanted = exchanges.kept(self._setup.plan, COORDINATOR, self._model.unit_names)
        own = self._states.pull({COORDINATOR: wanted}).states.get(COORDINATOR, {})
        unit_state.take(self._aggregator, self._relay.client_model | own, COORDINATOR)

    def _collect_traces(self, names: Sequence[str]) -> dict[str, int]:
        """Takes the hosts' timed actions, outside their round; returns what bytes they were."""
        if self._config.run.trace == "none":
            return {}
        return self.add_traces(self._members.collect(messages.TraceRows, names))

    def add_traces(self, mails: Mapping[str, Mail[Any]]) -> dict[str, int]:
        """Adds the devices' timed actions to the run's, on this host's clock."""
        traced = {}
        steps = [max(self._table.steps(one.steps) for one in self._population)] * self._places
        for name, mail in mails.items():
            assert mail.message is not None
            seat = self._members.links.seats.get(name, name)
            try:
                with self._members.reading(name):
                    rows = read_rows(mail.message, self._setup.plans, seat, steps, long_name(name))
            except ProtocolError:
                if name in self._members.by_name:
                    raise
                continue  # the run goes on without it
            # The offset is the peer's clock minus ours.
            self._run_log.add_trace(seat, rows, -(mail.message.link.offset_s or 0.0))
            traced[name] = mail.message.nbytes
        return traced
