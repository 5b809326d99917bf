"""The coordinator: plan, cohorts, rounds, aggregation, evaluation. The server host takes the role.

It is one thread that tells hosts what to do and waits for their answers. It never touches an
activation: those go from host to host.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import Interrupted, PeerError, RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.roles.chain_repair import ChainRepair
from pipar_jax.roles.checkpoints import Checkpoints, Moment
from pipar_jax.roles.conductor import Conductor
from pipar_jax.roles.evaluation import Evaluator
from pipar_jax.roles.federated_evaluation import evaluate_on_devices
from pipar_jax.roles.first_plan import first_plan, make_adaptation
from pipar_jax.roles.gathering import Cohort, Gathering
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.host_setup import HostSetup, samples_by_place
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_pool import NodePool
from pipar_jax.roles.past import Past, timetable
from pipar_jax.roles.prepared_steps import PreparedSteps
from pipar_jax.roles.private_rounds import PrivateRounds
from pipar_jax.roles.round_results import RoundResults
from pipar_jax.roles.round_start import RoundStart
from pipar_jax.roles.run_log import FetchStats, RunLog
from pipar_jax.roles.start_weights import first_variables
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.stop_rule import StopRule
from pipar_jax.runtime import exchanges
from pipar_jax.runtime.host import Host
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Order,
    Plan,
    host_index,
    is_device,
    long_name,
)
from pipar_jax.schedule.rounds import rounds
from pipar_jax.training.compile import TOLD_S, now_and_then
from stages import Model
from stages.personal import personal, shared
from stages.trees import Variables

#: How often the end of a host is waited for that is lost and back while the others end.
GOODBYES = 3


class Start(NamedTuple):
    """What a run begins from, and what ends it before its last round.

    Attributes:
      past: What there was of it before this process; None for a new run.
      stop_rule: Says when a score is good enough, or gets no better.
      finish: Set when the run is to end after a checkpoint.
    """

    past: Past | None
    stop_rule: StopRule
    finish: threading.Event


class Coordinator:
    """Conducts one run.

    Args:
      config: Resolved configuration.
      model: The whole model.
      host: The server host, in this process.
      members: The devices and compute nodes, admitted.
      evaluator: Scores the global weights.
      run_log: Takes what each round reports, and tells of it.
      save: Takes the final weights and batch statistics by unit, as soon as they are known, and
        after how many rounds.
      script: Plans of the rounds, from the first on; empty: as configured.
      checkpoints: Keeps the run on disk.
      start: What it begins from, and what ends it early.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        host: Host,
        members: Membership,
        evaluator: Evaluator,
        run_log: RunLog,
        save: Callable[[Variables, Variables, int], None],
        script: Sequence[Plan],
        checkpoints: Checkpoints,
        start: Start,
    ) -> None:
        self._config, self._model, self._host = config, model, host
        self._members, self._evaluator, self._run_log = members, evaluator, run_log
        self._save = save
        self._population, self._gathering = members.population, Gathering(config, members)
        kept = None if start.past is None else start.past.kept
        self._kept, self._checkpoints, self._start = kept, checkpoints, start
        facts: JsonObject = {} if kept is None else kept.facts
        if kept is not None:
            self._population.recall(facts["population"], time.monotonic())
        places, sampled = members.hosts.places, members.hosts.sampled
        samples = samples_by_place(self._population, places, sampled=sampled)
        kept_plan = None if kept is None else Plan.from_dict(facts["plan"])
        plan, surveyed = first_plan(
            config, model, members, script, samples, kept_plan, self._gathering.upcoming
        )
        self._begun_with = facts.get("steps") or [one.steps for one in self._population]
        self._table = timetable(config, plan, self._begun_with, facts)
        self._private = PrivateRounds(config, plan, self._population, self._table)
        present = [members.by_name[name].identity for name in self._population.present()]
        for name, why_not in self._private.begin(facts.get("private"), present).items():
            reason = f"{long_name(name)} cannot go on: {why_not}"
            if not members.hosts.may_lose:
                raise RunError(reason)
            members.lose(name, PeerError(reason))
        self._gathering.check_rounds(self._table.rounds)
        if plan.sums_gradients:  # raises PlanError: such devices step together
            known = [one.steps for one in self._population]
            rounds(plan, [*known, *known[:1] * (places - len(known))], 1)  # some come later
        self._adaptation = make_adaptation(
            config, model, host, members, script, plan, self._table.rounds, surveyed
        )
        # What a run goes on from is in its checkpoint, wherever it began.
        params, state = first_variables(model, config) if kept is None else model.init(config.seed)
        self._aggregator = Aggregator(config.aggregation, shared(model, params), state)
        self._score: dict[str, float] = {}
        self._holdings = Holdings(model, config)
        self._states = StateExchange(members, host, self._holdings)
        self._first = self._trained = 0 if kept is None else kept.rounds
        self._conductor = Conductor(config, model.unit_names, plan, host, members, self._states)
        profile = None if surveyed is None else surveyed.profile
        self._pool = NodePool(config, model, profile, members, host)
        self._prepared_steps = PreparedSteps(
            self._population, places, sampled=sampled, kept=facts.get("prepared")
        )
        self._setup = HostSetup(
            config, model, plan, samples, self._table, self._prepared_steps, host, members,
            self._pool, self._gathering, checkpoints, self._private, self._holdings,
            self._conductor, run_log,
        )  # fmt: skip
        self._repair = ChainRepair(
            config, model.unit_names, self._aggregator, members, self._pool, self._gathering,
            self._setup, self._states, run_log, self._first,
        )  # fmt: skip
        self._round_start = RoundStart(
            model.unit_names, config.optimizer, config.aggregation, host, members, self._setup,
            self._aggregator, self._states, self._table, personal(model, params),
        )  # fmt: skip
        self._results = RoundResults(
            config, model, host, members, self._setup, self._conductor.relay, self._aggregator,
            self._states, self._table, self._private, run_log,
            facts.get("demand") or [1.0] * places,
        )  # fmt: skip
        if plan.order == Order.SEQUENTIAL:
            self._conductor.relay.client_model = self._round_start.initial_client_model()
        members.lost = self._note_lost

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._setup.plan

    @property
    def _idle(self) -> tuple[str, ...]:
        """The hosts that have nothing to do, but for nodes whose state counts as lost."""
        return tuple(one for one in self._setup.idle if one not in self._pool.forgotten)

    def run(self) -> JsonObject:
        """Prepares all hosts, trains all rounds and says goodbye; returns the run's summary.

        The weights are saved before anything else that comes after the last round.

        Raises:
          PeerError: A device was lost or failed, and the run cannot go on without it.
          RunError: This process failed.
        """
        self._setup.prepare(self._aggregator)
        self._take_up()
        steps = self._setup.preparation(COORDINATOR).steps
        self._run_log.begin(self.plan, self._table, steps, self._first)
        if (promise := self._private.promise()) is not None:
            self._members.tell(promise)
        self._setup.begin_schedules(self._setup.workers)
        try:
            if self._adaptation is not None:
                self._adaptation.begin()
            for index in range(self._first, self._table.rounds):
                attempt = 0
                while not self._try_round(index, attempt):
                    attempt += 1
                if self._start.stop_rule.reason is not None and self._trained <= index:
                    self._end_before(index)
                    break
                if self._close_round(index):
                    break
                self._adapt(index + 1)
        finally:
            self._private.close()
            if self._adaptation is not None:
                self._adaptation.close()
        self._checkpoints.settle(self._members)
        self._say_goodbye()
        return self._run_log.finish()

    def _say_goodbye(self) -> None:
        """Lets every host end, those among them that join meanwhile."""
        self._members.broken_links.finish()
        told, times = self._members.roll(()), Counter[str]()
        while new := [name for name in self._members.by_name if not told.stayed(name)]:
            told = self._members.roll(self._members.by_name)
            times.update(new)
            for name in new:
                self._members.send(name, messages.Finish())
            # Whoever comes back again and again does not keep the others.
            working = [
                name for name in self._setup.workers if name in new and times[name] <= GOODBYES
            ]
            self._results.add_traces(self._members.collect(messages.Bye, working))

    def _end_before(self, index: int) -> None:
        """Ends the run without a round that a device's privacy budget does not allow.

        Raises:
          RunError: There was no round before it.
        """
        reason = self._start.stop_rule.reason
        if index == self._first:
            raise RunError(f"{reason}; the run ends before its first round")
        self._close_round(index - 1)

    def _close_round(self, index: int) -> bool:
        """Scores and keeps what a round came to; returns whether the run ends with it.

        Raises:
          Interrupted: The run was asked to end, and is kept.
        """
        last = index + 1 == self._table.rounds
        rule, checkpoints = self._start.stop_rule, self._checkpoints
        self._score = {}
        evaluated = rule.reason is not None or self._is_evaluated(index)
        copied = self._repair.copies.are_due(index + 1) and not last
        if copied:
            self._run_log.nodes_copied(index, self._repair.fetch(index + 1, optimizers=True))
        if evaluated:
            fetched = (
                FetchStats(0, 0.0) if copied else self._repair.fetch(index + 1, optimizers=False)
            )
            self._evaluate(index, fetched)
        if rule.reason is not None:
            last = True
            self._members.tell({"event": "stopped", "round": index, "reason": rule.reason})
            self._save(self._aggregator.params, self._aggregator.state, index + 1)
        finish = self._start.finish.is_set() and checkpoints.wanted and not last
        if checkpoints.is_due(index + 1) or (checkpoints.wanted and (last or finish)):
            handed_on = self._conductor.relay.client_model
            moment = Moment(
                index + 1, self.plan, self._aggregator, self._repair.copies, handed_on,
                self._facts(index + 1),
            )  # fmt: skip
            checkpoints.take(moment, self._idle, self._states, self._members, self._score)
        if finish:
            checkpoints.settle(self._members)
            self._members.tell({"event": "interrupted", "rounds": index + 1})
            raise Interrupted(
                f"the run was asked to end, and has a checkpoint after {index + 1} rounds: go on "
                "with --config.run.resume=auto"
            )
        return last

    def _facts(self, rounds: int) -> JsonObject:
        """Returns what a checkpoint holds of the run beside its arrays, JSON-ready."""
        return {
            "demand": list(self._results.demand),
            "steps": self._begun_with,
            "ends": self._table.ends_after(rounds),
            "prepared": self._prepared_steps.facts,
            "population": self._population.records(),
            "private": self._private.facts,
            "finished": rounds == self._table.rounds,
            "stopped": self._start.stop_rule.reason,
            "signature": SIGNATURE.write(self._model.signature),
            "frozen": {unit.name: sorted(unit.frozen) for unit in self._model.units if unit.frozen},
            "base": dict(zip(self._model.unit_names, self._setup.base_digests, strict=False)),
        }

    # --- before the first round ---------------------------------------------------------------

    def _take_up(self) -> None:
        """Lets all hosts begin from a checkpoint, or from the weights of another run."""
        names = self._model.unit_names
        copied = self._members.hosts.nodes if self._config.nodes.replicate_every else ()
        pulled = self._checkpoints.pulled_from(self._setup.workers)
        hosts = dict.fromkeys((COORDINATOR, *pulled, *copied))
        held = [exchanges.optimizer_states(self.plan, name, names) for name in hosts]
        self._checkpoints.check_space(
            self._aggregator.nbytes + sum(self._holdings.nbytes(one) for one in held)
        )
        if self._kept is not None:
            self._repair.take_up(self._kept)
            restored = self._checkpoints.restore(
                self._kept, self.plan, self._aggregator, self._idle, self._states, self._members
            )
            for name in restored.fresh:
                if is_device(name):
                    self._population[host_index(name)].fresh = True
            if restored.client_model:
                self._conductor.relay.client_model = restored.client_model
        elif self._config.model.weights:
            self._checkpoints.spread(
                self.plan, self._aggregator, self._idle, self._states, self._members
            )

    # --- a round ------------------------------------------------------------------------------

    def _try_round(self, index: int, attempt: int) -> bool:
        """Conducts an attempt at a round to its last weights stored; returns whether it counts."""
        self._repair.repair(index)
        cohort = self._gather(index, attempt)
        self._conductor.nodes = tuple(self._pool.ready)
        self._conductor.clip = self._private.clip
        if self._adaptation is not None:
            self._adaptation.start_round(index)
        spans = self._round_start.spans(index, cohort)
        spent = self._private.exhausted(index, cohort.devices, cohort.taking, spans)
        if spent:
            if self._gathering.go_on_without(spent):
                return False
            self._start.stop_rule.reason = next(iter(spent.values()))
            return True
        self._round_start.seat(cohort)
        fresh = self._round_start.bring_up_to_date(cohort)
        self._run_log.start_round()
        done, said = self._conductor.conduct(
            cohort, index, spans, self._results.demand, self._setup.samples
        )
        self._results.average(done)
        self._results.store(done)
        noted = self._repair.noted
        lost = dataclasses.replace(said.nodes, before=noted.before, plan=noted.plan)
        self._run_log.add_attempt(dataclasses.replace(said, fresh=fresh, nodes=lost))
        self._repair.end_attempt(index, said.nodes, whole=done.whole)
        self._results.count(done)
        if done.whole:
            self._trained = index + 1
        cut_short = done.places and not done.whole
        self._round_start.until = max(span.stop for span in spans) if cut_short else None
        return done.whole

    def _gather(self, index: int, attempt: int) -> Cohort:
        """Waits for the devices of a round, and chooses among those that have met all neighbours.

        Whoever is lost while neighbours meet is not in the round: a node that has never met it
        could not even begin. No mail is read between the choice and the seats.
        """
        self._gathering.settle()
        while True:
            self._gathering.await_enough(index)
            ready = self._population.ready()
            self._setup.introduce(self.plan)  # those as well that were late when it was last done
            if arrived := self._gathering.take_arrived():
                self._checkpoints.restore_personal(arrived, index, self._members)
                self._setup.calibrate(arrived)
                self._setup.begin_schedules(arrived)
            if self._population.ready() == ready:
                cohort = self._gathering.choose(index, attempt)
                if cohort is not None:
                    return cohort

    def _note_lost(self, name: str) -> None:
        """Goes on without a host whose link is gone: its neighbours have to meet it anew."""
        self._pool.lose(name)
        self._setup.forget_links(name)
        self._conductor.note_lost(name)

    # --- between rounds -----------------------------------------------------------------------

    def _adapt(self, index: int) -> None:
        """Changes the plan before a round, if another one is wanted and compiled."""
        plan = None if self._adaptation is None else self._adaptation.ready()
        if plan is None or self._adaptation is None:
            return
        self._setup.change(
            plan, index, self._states, self._aggregator, self._repair.copies,
            offers=self._adaptation.offers,
        )  # fmt: skip
        self._adaptation.changed(index)

    def _is_evaluated(self, index: int) -> bool:
        every = self._config.run.evaluate_every
        return index + 1 == self._table.rounds or (every > 0 and (index + 1) % every == 0)

    def _evaluate(self, index: int, fetched: FetchStats) -> None:
        """Scores the global weights, the last ones once they are saved; it belongs to no round."""
        variables = self._aggregator.params, self._aggregator.state
        if index + 1 == self._table.rounds:
            self._save(*variables, index + 1)  # before anything else can go wrong
        self._members.working("evaluating")
        start_s = time.monotonic()
        local, on = None, self._config.run.evaluate_on
        if on != "server":
            devices = [name for name in self._setup.idle if is_device(name)]
            task = self._model.task
            local = evaluate_on_devices(
                self._members, devices, self._aggregator, task, index,
                self._config.data.max_samples,
            )  # fmt: skip
        if on == "devices" and local is not None:
            score = local.overall
        else:
            tell = functools.partial(self._members.reports.tell_working, COORDINATOR, "evaluating")
            score = self._evaluator.evaluate(*variables, now_and_then(tell, TOLD_S))
        self._score = score.numbers
        self._run_log.evaluated(index, score, time.monotonic() - start_s, fetched, local)
