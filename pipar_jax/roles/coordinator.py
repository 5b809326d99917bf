"""The coordinator: plan, rounds, aggregation, evaluation. The server host takes the role.

It is one thread that tells hosts what to do and waits for their answers. It never touches an
activation: those go from host to host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import Config
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol import messages
from pipar_jax.roles import replan
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.adaptation import Adaptation
from pipar_jax.roles.evaluation import Evaluator
from pipar_jax.roles.holdings import Holdings, read_rows
from pipar_jax.roles.link_stats import odd_rows
from pipar_jax.roles.membership import Mail, Membership
from pipar_jax.roles.replies import Reply, reply
from pipar_jax.roles.run_log import FetchStats, Round, RunLog
from pipar_jax.roles.scripted_plans import ScriptedPlans
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.survey import choose_plan
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.link_table import direct
from pipar_jax.runtime.metrics import Totals
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule import actions
from pipar_jax.schedule.actions import AGGREGATE, ALL, Action, RoundSchedule, Span
from pipar_jax.schedule.plan import COORDINATOR, Boundary, Order, Plan, device_name, long_name
from pipar_jax.schedule.trace import Interval, Timed
from stages import Model
from stages.trees import Variables


class Coordinator:
    """Conducts one run.

    Args:
      config: Resolved configuration.
      model: The whole model.
      host: The server host, in this process.
      members: The devices, all admitted.
      evaluator: Scores the global weights.
      run_log: Takes what each round reports, and tells of it.
      save: Takes the final weights and batch statistics by unit, as soon as they are known.
      script: Plans of the rounds, from the first on; empty: as configured.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        host: Host,
        members: Membership,
        evaluator: Evaluator,
        run_log: RunLog,
        save: Callable[[Variables, Variables], None],
        script: Sequence[Plan] = (),
    ) -> None:
        self._config, self._model, self._host = config, model, host
        self._members, self._evaluator, self._run_log = members, evaluator, run_log
        self._save = save
        who = [members.by_name[device_name(i)].identity for i in range(config.devices.count)]
        self._samples = tuple(one.samples for one in who)
        self._steps = tuple(one.steps for one in who)
        self.plan, surveyed = (
            (script[0], None) if script else choose_plan(config, model, members, self._samples)
        )
        self._rounds = actions.rounds(self.plan, self._steps, config.epochs)
        self._devices = members.hosts.devices
        self._nodes = members.hosts.nodes
        self._workers = (*self._nodes, *self._devices)
        self._adaptation: Adaptation | ScriptedPlans | None = None
        if script:
            self._adaptation = ScriptedPlans(script, members, host, len(model.units))
        elif config.tuner.adapt and surveyed is not None:
            rounds = len(self._rounds)
            self._adaptation = Adaptation(config, model, surveyed, self.plan, rounds, members, host)
        params, state = model.init(config.seed)
        self._aggregator = Aggregator(config.aggregation, params, state)
        self._holder = self._attempt = 0
        self._client_model: States = {}
        self._demand = [1.0] * len(who)
        self._met: set[Boundary] = set()
        self._holdings = Holdings(model, config)
        self._states = StateExchange(members, host, self._holdings)
        self._plans: tuple[Plan, ...] = (self.plan,)
        self._total = [
            sum(span.stop - span.first for spans in self._rounds for span in spans
                if span.device == device)
            for device in range(len(who))
        ]  # fmt: skip

    def run(self) -> JsonObject:
        """Prepares all hosts, trains all rounds and says goodbye; returns the run's summary.

        The weights are saved before anything else that comes after the last round.

        Raises:
          PeerError: A device was lost or failed.
          RunError: This process failed.
        """
        self._prepare()
        self._run_log.begin(self.plan, self._rounds, self._steps)
        self._begin_schedules()
        try:
            if self._adaptation is not None:
                self._adaptation.begin()
            for index, spans in enumerate(self._rounds):
                self._round(index, spans)
                if self._is_evaluated(index):
                    self._evaluate(index)
                if index + 1 < len(self._rounds):
                    self._adapt(index + 1)
        finally:
            if self._adaptation is not None:
                self._adaptation.close()
        self._members.broadcast(messages.Finish())
        self._add_traces(self._members.collect(messages.Bye, self._workers))
        return self._run_log.finish()

    # --- before the first round ---------------------------------------------------------------

    def _prepare(self) -> None:
        """Sends the plan, waits until all have compiled, and lets slow hosts time themselves."""
        self._introduce(self.plan)
        began = time.monotonic()
        self._members.working("compiling")
        total = tuple(self._total)
        self._expect(self.plan)
        self._members.broadcast(messages.Prepare(self.plan, self._samples, total))
        self._host.prepare(self.plan, self._samples, total)
        if self.plan.order == Order.PARALLEL:
            self._aggregator.compile()
            self._aggregator.broken_units()  # compiles what finds them, too
        ready = self._members.collect(messages.Prepared, (COORDINATOR, *self._workers))
        compile_s = time.monotonic() - began
        self._calibrate()
        seconds = time.monotonic() - began - compile_s
        needs = {name: mail.said.memory_bytes for name, mail in ready.items()}
        self._run_log.prepared(compile_s, seconds, needs)

    def _expect(self, *plans: Plan) -> None:
        """Takes from members what the last of some plans has for them, and nothing larger.

        Args:
          *plans: The plan in force, and the one that is changed to.
        """
        self._members.acceptance = Acceptance(
            self._model, plans[-1], COORDINATOR, samples=self._samples,
            batch_size=self._config.data.batch_size,
        )  # fmt: skip
        for name in self._workers:
            tensor_bytes = self._members.acceptance.tensor_bytes(name)
            self._members.by_name[name].link.admit(
                self._holdings.allowance(plans, name, self._rounds, tensor_bytes)
            )

    def _introduce(self, plan: Plan) -> None:
        """Lets neighbours in chains connect to each other, where a plan needs it."""
        boundaries = direct(plan.boundaries())
        if self._met.issuperset(boundaries):
            return
        known = {name: self._members.by_name[name].identity.address for name in self._nodes}
        addresses = {name: address for name, address in known.items() if address is not None}
        self._members.broadcast(messages.Meet(tuple(boundaries), addresses))
        self._members.collect(messages.Met, self._workers)
        self._met.update(boundaries)

    def _calibrate(self) -> None:
        """Lets each emulated slow host time its functions, one after another, all else idle."""
        if self._config.server.slowdown != 1.0:
            self._host.calibrate()
            self._members.collect(messages.Calibrated, (COORDINATOR,))
        for name in self._workers:
            if self._members.hosts[name].slowdown.emulated:
                self._members.send(name, messages.Calibrate())
                self._members.collect(messages.Calibrated, (name,))

    def _begin_schedules(self) -> None:
        """Lets the rates of emulated links change from now on, where they do."""
        for name in self._devices:
            down = self._members.hosts[name].down
            if down.schedule:
                self._members.by_name[name].link.set_shape(down)

    # --- a round ------------------------------------------------------------------------------

    def _round(self, index: int, spans: Sequence[Span]) -> None:
        """Releases the hosts, follows the round to its last weights stored, and tells of it."""
        sequential = self.plan.order == Order.SEQUENTIAL
        if self._adaptation is not None:
            self._adaptation.start_round(index)
        hosts = (COORDINATOR, *self._workers)
        self._run_log.start_round()
        start_s = time.monotonic()
        holder = self._holder if sequential else None
        self._attempt += 1
        self._members.open(spans, self._attempt)
        cohort = tuple(range(len(self.plan.devices)))
        release = messages.Release(
            index, self._attempt, tuple(spans), cohort, holder, tuple(self._demand)
        )
        self._host.release(release)
        for name in self._workers:
            self._members.send(name, release, *self._round_replies(name, index, spans))
        if sequential:
            self._relay(spans)
        trained = self._members.collect(messages.Trained, hosts)
        self._commit(index, cohort)
        if not sequential:
            self._average(index, spans, trained)
        stored = self._members.collect(messages.Stored, hosts)
        interval = Interval(start_s, max(mail.time_s for mail in stored.values()))
        if sequential:
            self._gather_sequential()
        traced = self._collect_traces()
        rows, busy_s = self._host.recorder.take()
        self._run_log.add_trace(COORDINATOR, rows, 0.0)
        said = {name: mail.said for name, mail in stored.items()}
        busy = {COORDINATOR: busy_s} | {name: said[name].busy_s for name in self._workers}
        for name in self._workers:
            if (odd := odd_rows(said[name].direct, name, self._met)) is not None:
                self._members.blame(name, odd)
        for one in said.values():  # none is longer than the round, whatever is said of it
            self._members.patience.action(min(one.longest_s, interval.seconds))
        self._run_log.end_round(
            Round(
                index,
                interval,
                totals=Totals(
                    *(sum(getattr(one, key) for one in said.values()) for key in Totals._fields)
                ),
                busy=busy,
                overruns=sum(one.overruns for one in said.values()),
                told={name: said[name].link for name in self._workers},
                traced=traced,
                direct=[row for name in self._workers for row in said[name].direct],
                memory={name: one.memory for name, one in said.items()},
            )
        )
        for span in spans:
            steps = sum(s.stop - s.first for s in spans if s.device == span.device)
            if steps:
                self._demand[span.device] = busy[device_name(span.device)] / steps

    def _commit(self, index: int, places: tuple[int, ...]) -> None:
        """Tells all hosts of a round which places of it count."""
        commit = messages.Commit(index, places)
        for name in self._workers:
            # Who gives weights to the average is over with the round when it has them back.
            self._members.send(
                name, commit, *([] if self._gives(name) else self._end_replies(index))
            )
        self._host.commit(places)

    def _round_replies(self, name: str, index: int, spans: Sequence[Span]) -> list[Reply]:
        """Returns what a member owes once a round is released."""
        parts = []
        if self.plan.order == Order.SEQUENTIAL:
            parts = [
                reply(messages.ClientModel, device=one.device, step=one.stop - 1)
                for one, after in zip(spans, [*spans[1:], None], strict=True)
                if device_name(one.device) == name and (after is None or after.device != one.device)
            ]
        return [*parts, reply(messages.Trained, round=index)]

    def _end_replies(self, index: int) -> list[Reply]:
        """Returns what a member owes when a round ends."""
        traced = [reply(messages.TraceRows)] if self._config.run.trace != "none" else []
        return [reply(messages.Stored, round=index), *traced]

    def _gives(self, name: str) -> bool:
        """Says whether a host gives weights to the average, and so is given it."""
        return bool(exchanges.trained(self.plan, name, self._model.unit_names))

    def _average(
        self, index: int, spans: Sequence[Span], trained: Mapping[str, Mail[messages.Trained]]
    ) -> None:
        """Averages what the hosts trained and hands the result back to them."""
        copies: dict[int, Contribution] = {}
        brought = [name for name in self._workers if self._gives(name)]
        for name, mail in trained.items():
            wanted = exchanges.trained(self.plan, name, self._model.unit_names)
            for (copy, unit), one in self._states.read(mail, wanted).items():
                own = copies.setdefault(copy, Contribution({}, {}, 1.0))
                own.params[unit], own.state[unit] = dict(one.params or {}), dict(one.state or {})
        if ALL in copies:  # the one copy of what devices share on the server: nothing to average
            self._aggregator.params.update(copies[ALL].params)
            self._aggregator.state.update(copies[ALL].state)
        batch_size = self._config.data.batch_size
        round_ = RoundSchedule(self.plan, tuple(spans), self._samples, batch_size)
        replicas = []
        for span in spans:
            if span.stop > span.first and span.device in copies:
                weight = round_.trained_samples(span) if self._config.aggregation.weighted else 1
                replicas.append(copies[span.device]._replace(weight=float(weight)))
        start_s = time.monotonic()
        self._aggregator.aggregate(replicas)
        if broken := self._aggregator.broken_units():
            last = max(span.stop for span in spans) - 1
            self._members.end_broken(messages.NonFinite("average", None, index, last, broken))
        spent_s = time.monotonic() - start_s
        time.sleep(spent_s * (self._config.server.slowdown - 1.0))
        action = Action(0, AGGREGATE, ALL, spans[0].stop - 1)
        self._host.recorder.add(Timed(action, start_s, time.monotonic()))
        codec, owed = self._config.aggregation.codec, self._end_replies(index)
        for name in (*brought, COORDINATOR):
            wanted = exchanges.averaged(self.plan, name, self._model.unit_names)
            mean = unit_state.known(wanted, self._aggregator)
            self._states.push(name, mean, messages.PushState(round=index), *owed, codec=codec)

    # --- sequential order ---------------------------------------------------------------------

    def _relay(self, spans: Sequence[Span]) -> None:
        """Relays the client-side model from device to device, until the last gives it back."""
        if spans[0].device != self._holder:
            self._hand_over(spans[0])
        for before, after in zip(spans, [*spans[1:], None], strict=True):
            if after is not None and after.device == before.device:
                continue
            giver = device_name(before.device)
            mail = self._members.collect(messages.ClientModel, (giver,))[giver]
            wanted = exchanges.client_model(self.plan, before.device, self._model.unit_names)
            self._client_model, self._holder = self._states.read(mail, wanted), before.device
            if after is not None:
                self._hand_over(after)

    def _hand_over(self, span: Span) -> None:
        """Sends the client-side model, with its optimiser state, to the device whose turn it is."""
        why = messages.PushState(step=span.first)
        self._states.push(device_name(span.device), self._client_model, why)

    def _gather_sequential(self) -> None:
        """Takes the one copy of every unit: the client-side model as handed back, the rest here."""
        wanted = exchanges.kept(self.plan, COORDINATOR, self._model.unit_names)
        own = self._states.pull({COORDINATOR: wanted}).states.get(COORDINATOR, {})
        unit_state.take(self._aggregator, self._client_model | own, COORDINATOR)

    # --- between rounds -----------------------------------------------------------------------

    def _collect_traces(self) -> dict[str, int]:
        """Takes the hosts' timed actions, outside their round; returns what bytes they were."""
        if self._config.run.trace == "none":
            return {}
        return self._add_traces(self._members.collect(messages.TraceRows, self._workers))

    def _add_traces(self, mails: Mapping[str, Mail[Any]]) -> dict[str, int]:
        """Adds the devices' timed actions to the run's, on this host's clock."""
        traced = {}
        for name, mail in mails.items():
            assert mail.message is not None
            with self._members.reading(name):
                rows = read_rows(mail.message, self._plans, name, self._total, long_name(name))
            # The offset is the peer's clock minus ours.
            self._run_log.add_trace(name, rows, -(mail.message.link.offset_s or 0.0))
            traced[name] = mail.message.nbytes
        return traced

    def _adapt(self, index: int) -> None:
        """Changes the plan before a round, if another one is wanted and compiled."""
        plan = None if self._adaptation is None else self._adaptation.ready()
        if plan is None or self._adaptation is None:
            return
        began = time.monotonic()
        self._introduce(plan)
        self._expect(self.plan, plan)
        replan.conduct(self._members, self._states, self.plan, plan, self._aggregator)
        moved_s = time.monotonic() - began
        offers, self.plan, self._plans = self._adaptation.offers, plan, (self.plan, plan)
        self._calibrate()  # stages that an emulated slow host has not run before
        self._adaptation.changed(index)
        self._run_log.replanned(index, plan, moved_s, offers)

    def _is_evaluated(self, index: int) -> bool:
        every = self._config.run.evaluate_every
        return index + 1 == len(self._rounds) or (every > 0 and (index + 1) % every == 0)

    def _evaluate(self, index: int) -> None:
        """Scores the global weights, the last ones once they are saved; it belongs to no round."""
        fetched = self._fetch()
        variables = self._aggregator.params, self._aggregator.state
        if index + 1 == len(self._rounds):
            self._save(*variables)
        self._members.working("evaluating")
        start_s = time.monotonic()
        score = self._evaluator.evaluate(*variables)
        self._run_log.evaluated(
            index, score.accuracy, score.loss, time.monotonic() - start_s, fetched
        )

    def _fetch(self) -> FetchStats:
        """Takes the parts of the model that live on compute nodes, which only evaluation needs."""
        start_s = time.monotonic()
        names = self._model.unit_names
        kept = {name: exchanges.kept(self.plan, name, names) for name in self._nodes}
        pulled = self._states.pull(kept)
        for name, states in pulled.states.items():
            unit_state.take(self._aggregator, states, name)
        return FetchStats(pulled.nbytes, time.monotonic() - start_s)
