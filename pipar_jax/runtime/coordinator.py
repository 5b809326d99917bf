"""The coordinator: plan, rounds, aggregation, evaluation. The server host takes the role.

It is one thread that tells hosts what to do and waits for their answers. It never touches an
activation: those go from host to host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import comms
from pipar_jax import config as configuration
from pipar_jax import schedule
from pipar_jax.aggregation import Aggregator, Replica
from pipar_jax.config import Config
from pipar_jax.plan import COORDINATOR, Boundary, Plan, device_name
from pipar_jax.runtime import bundle, handover
from pipar_jax.runtime.adaptation import Adaptation
from pipar_jax.runtime.evaluation import Evaluator
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.members import Mail, Members
from pipar_jax.runtime.meter import Totals
from pipar_jax.runtime.script import Script
from pipar_jax.runtime.survey import choose_plan
from pipar_jax.runtime.tally import Fetched, Round, Tally
from pipar_jax.runtime.wiring import direct
from pipar_jax.schedule import AGGREGATE, ALL, Action, RoundSchedule, Span
from pipar_jax.slowness import slowness_of
from pipar_jax.trace import Interval, Timed
from stages import Model


class Coordinator:
    """Conducts one run.

    Args:
      config: Resolved configuration.
      model: The whole model.
      host: The server host, in this process.
      members: The devices, all admitted.
      evaluator: Scores the global weights.
      tally: Takes what each round reports, and tells of it.
      save: Takes the final weights and batch statistics by unit, as soon as they are known.
      script: Plans of the rounds, from the first on; empty: as configured.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        host: Host,
        members: Members,
        evaluator: Evaluator,
        tally: Tally,
        save: Callable[[dict[str, Any], dict[str, Any]], None],
        script: Sequence[Plan] = (),
    ) -> None:
        """See the class."""
        self._config, self._model, self._host = config, model, host
        self._members, self._evaluator, self._tally = members, evaluator, tally
        self._save = save
        who = [members.by_name[device_name(i)].identity for i in range(config.devices.count)]
        self._samples = tuple(one.samples for one in who)
        self._steps = tuple(one.steps for one in who)
        self.plan, surveyed = (
            (script[0], None) if script else choose_plan(config, model, members, self._samples)
        )
        self._rounds = schedule.rounds(self.plan, self._steps, config.epochs)
        self._devices = tuple(device_name(i) for i in range(config.devices.count))
        self._nodes = configuration.nodes(config)
        self._workers = (*self._nodes, *self._devices)
        self._adaptation: Adaptation | Script | None = None
        if script:
            self._adaptation = Script(script, members, host, len(model.units))
        elif config.tuner.adapt and surveyed is not None:
            rounds = len(self._rounds)
            self._adaptation = Adaptation(config, model, surveyed, self.plan, rounds, members, host)
        params, state = model.init(config.seed)
        self._aggregator = Aggregator(config.aggregation, params, state)
        self._holder = 0
        self._part: dict[str, np.ndarray[Any, Any]] = {}
        self._demand = [1.0] * len(who)
        self._met: set[Boundary] = set()

    def run(self) -> dict[str, Any]:
        """Prepares all hosts, trains all rounds and says goodbye; returns the run's summary.

        The weights are saved before anything else that comes after the last round.

        Raises:
          PeerError: A device was lost or failed.
          RunError: This process failed.
        """
        self._prepare()
        self._tally.begin(self.plan, self._rounds, self._steps)
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
        self._members.broadcast({"type": "finish"})
        self._add_traces(self._members.collect("bye", self._workers))
        return self._tally.finish()

    # --- before the first round ---------------------------------------------------------------

    def _prepare(self) -> None:
        """Sends the plan, waits until all have compiled, and lets slow hosts time themselves."""
        self._introduce(self.plan)
        began = time.monotonic()
        total = [0] * len(self._steps)
        for spans in self._rounds:
            for span in spans:
                total[span.device] += span.stop - span.first
        plan = {"type": "plan", "plan": self.plan.to_dict(), "samples": self._samples,
                "steps": total}  # fmt: skip
        self._members.broadcast(plan)
        self._host.prepare(self.plan, self._samples, total)
        if self.plan.order == "parallel":
            # A unit has one replica per device, wherever each is cut.
            count = sum(1 for n in total if n)
            self._aggregator.compile({unit: count for unit in self._model.unit_names})
        ready = self._members.collect("prepared", (COORDINATOR, *self._workers))
        compile_s = time.monotonic() - began
        self._calibrate()
        seconds = time.monotonic() - began - compile_s
        needs = {name: mail.body["memory_bytes"] for name, mail in ready.items()}
        self._tally.prepared(compile_s, seconds, needs)

    def _introduce(self, plan: Plan) -> None:
        """Lets neighbours in chains connect to each other, where a plan needs it."""
        boundaries = direct(plan.boundaries())
        if self._met.issuperset(boundaries):
            return
        addresses = {name: self._members.by_name[name].identity.address for name in self._nodes}
        self._members.broadcast(
            {"type": "meet", "boundaries": [list(one) for one in boundaries],
             "addresses": addresses}
        )  # fmt: skip
        self._members.collect("met", self._workers)
        self._met.update(boundaries)

    def _calibrate(self) -> None:
        """Lets each emulated slow host time its functions, one after another, all else idle."""
        if self._config.server.slowdown != 1.0:
            self._host.calibrate()
            self._members.collect("calibrated", (COORDINATOR,))
        for name in self._workers:
            if slowness_of(configuration.host(self._config, name)).emulated:
                self._members.send(name, {"type": "calibrate"})
                self._members.collect("calibrated", (name,))

    def _begin_schedules(self) -> None:
        """Lets the rates of emulated links change from now on, where they do."""
        for index, name in enumerate(self._devices):
            _, down = comms.parse_link(configuration.device(self._config, index).link)
            if down.schedule:
                self._members.by_name[name].link.set_shape(down)

    # --- a round ------------------------------------------------------------------------------

    def _round(self, index: int, spans: Sequence[Span]) -> None:
        """Releases the hosts, follows the round to its last weights stored, and tells of it."""
        sequential = self.plan.order == "sequential"
        if self._adaptation is not None:
            self._adaptation.start_round(index)
        hosts = (COORDINATOR, *self._workers)
        self._tally.start_round()
        start_s = time.monotonic()
        self._host.release(index, spans, self._holder if sequential else None, self._demand)
        self._members.broadcast(
            {"type": "release", "round": index, "spans": [list(span) for span in spans],
             "holder": self._holder if sequential else None, "demand": self._demand}
        )  # fmt: skip
        if sequential:
            self._pass_part_on(spans)
        else:
            self._average(spans, self._members.collect("trained", hosts))
        stored = self._members.collect("stored", hosts)
        interval = Interval(start_s, max(mail.time_s for mail in stored.values()))
        if sequential:
            self._gather_sequential()
        traced = self._collect_traces()
        rows, busy_s = self._host.recorder.take()
        self._tally.add_trace(COORDINATOR, rows, 0.0)
        bodies = {name: mail.body for name, mail in stored.items()}
        busy = {COORDINATOR: busy_s} | {name: bodies[name]["busy_s"] for name in self._workers}
        self._tally.end_round(
            Round(
                index,
                interval,
                totals=Totals(
                    *(sum(body[key] for body in bodies.values()) for key in Totals._fields)
                ),
                busy=busy,
                overruns=sum(body["overruns"] for body in bodies.values()),
                told={name: bodies[name]["link"] for name in self._workers},
                traced=traced,
                direct=[row for name in self._workers for row in bodies[name]["direct"]],
                memory={name: body["memory"] for name, body in bodies.items()},
            )
        )
        for span in spans:
            steps = sum(s.stop - s.first for s in spans if s.device == span.device)
            if steps:
                self._demand[span.device] = busy[device_name(span.device)] / steps

    def _average(self, spans: Sequence[Span], trained: Mapping[str, Mail]) -> None:
        """Averages what the hosts trained and hands the result back to them."""
        parts: dict[int, dict[str, dict[str, Any]]] = {}
        brought = [
            name
            for name in self._workers
            for message in [trained[name].message]
            if message is not None and message.kind == "bundle"
        ]
        for name, mail in trained.items():
            for device, groups in self._arrays(name, mail).items():
                own = parts.setdefault(int(device), {"params": {}, "state": {}})
                own["params"].update(groups.get("params", {}))
                own["state"].update(groups.get("state", {}))
        if ALL in parts:  # the one copy of what devices share on the server: nothing to average
            self._aggregator.params.update(parts[ALL]["params"])
            self._aggregator.state.update(parts[ALL]["state"])
        batch_size = self._config.data.batch_size
        round_ = RoundSchedule(self.plan, tuple(spans), self._samples, batch_size)
        replicas = []
        for span in spans:
            if span.stop > span.first and span.device in parts:
                one = parts[span.device]
                for unit in one["params"]:  # units without statistics send none
                    one["state"].setdefault(unit, {})
                weight = round_.trained_samples(span) if self._config.aggregation.weighted else 1
                replicas.append(Replica(one["params"], one["state"], float(weight)))
        start_s = time.monotonic()
        self._aggregator.aggregate(replicas)
        spent_s = time.monotonic() - start_s
        time.sleep(spent_s * (self._config.server.slowdown - 1.0))
        action = Action(0, AGGREGATE, ALL, spans[0].stop - 1)
        self._host.recorder.add(Timed(action, start_s, time.monotonic()))
        for name in brought:
            body = {"type": "store"}
            self._members.send_bundle(
                name, "store", self._units_of(name), body, codec=self._config.aggregation.codec
            )
        self._host.store(self._aggregator.params, self._aggregator.state)

    def _arrays(self, name: str, mail: Mail) -> dict[str, Any]:
        """Returns a host's trained weights by device, checked if they came over a link."""
        if mail.message is None:
            return mail.arrays
        if mail.message.kind != "bundle":
            return {}
        groups = bundle.unpack(mail.message.tensors, name)
        bundle.check_groups(groups, self._model, name)
        return groups

    def _units_of(self, host: str) -> bundle.Tensors:
        """Returns the global weights of the units that a host gave to the average."""
        count = len(self._model.units)
        local = self.plan.local_units(host, count)
        held = [unit for unit in self.plan.held_units(host, count) if unit not in local]
        names = [self._model.unit_names[i] for i in held]
        params, state = self._aggregator.params, self._aggregator.state
        return bundle.pack(
            {"whole": {"params": {n: params[n] for n in names},
                       "state": {n: state[n] for n in names}}}
        )  # fmt: skip

    # --- sequential order ---------------------------------------------------------------------

    def _pass_part_on(self, spans: Sequence[Span]) -> None:
        """Relays the device part from each device to the next, until the last gives it back."""
        if spans[0].device != self._holder:
            self._give_part(spans[0])
        for before, after in zip(spans, [*spans[1:], None], strict=True):
            if after is not None and after.device == before.device:
                continue
            giver = device_name(before.device)
            message = self._members.collect("part", (giver,))[giver].message
            assert message is not None
            self._part, self._holder = dict(message.tensors), before.device
            if after is not None:
                self._give_part(after)

    def _give_part(self, span: Span) -> None:
        """Sends the device part, with its optimiser state, to the device whose turn it is."""
        body = {"type": "part", "step": span.first}
        self._members.send_bundle(device_name(span.device), "part", self._part, body)

    def _gather_sequential(self) -> None:
        """Takes the one copy of every unit: the device part as handed back, the rest from here."""
        part = bundle.part_of(bundle.unpack(self._part, device_name(self._holder)), "part")
        params, state = self._host.shared_variables()
        own, stats = self._aggregator.params, self._aggregator.state
        own.update(jax.tree.map(np.array, part["params"]))
        stats.update(jax.tree.map(np.array, part["state"]))
        own.update(params)
        stats.update(state)

    # --- between rounds -----------------------------------------------------------------------

    def _collect_traces(self) -> dict[str, int]:
        """Takes the hosts' timed actions, outside their round; returns what bytes they were."""
        if self._config.run.trace == "none":
            return {}
        return self._add_traces(self._members.collect("trace", self._workers))

    def _add_traces(self, mails: Mapping[str, Mail]) -> dict[str, int]:
        """Adds the devices' timed actions to the run's, on this host's clock."""
        traced = {}
        for name, mail in mails.items():
            assert mail.message is not None
            rows = bundle.unpack_rows(mail.message.tensors, name)
            # The offset is the peer's clock minus ours.
            self._tally.add_trace(name, rows, -(mail.message.link.offset_s or 0.0))
            traced[name] = mail.message.nbytes
        return traced

    def _adapt(self, index: int) -> None:
        """Changes the plan before a round, if another one is wanted and compiled."""
        plan = None if self._adaptation is None else self._adaptation.ready()
        if plan is None or self._adaptation is None:
            return
        began = time.monotonic()
        self._introduce(plan)
        handover.conduct(self._members, self._host, self._model, self.plan, plan, self._aggregator)
        moved_s = time.monotonic() - began
        offers, self.plan = self._adaptation.offers, plan
        self._calibrate()  # stages that an emulated slow host has not run before
        self._adaptation.changed(index)
        self._tally.replanned(index, plan, moved_s, offers)

    def _is_evaluated(self, index: int) -> bool:
        every = self._config.run.evaluate_every
        return index + 1 == len(self._rounds) or (every > 0 and (index + 1) % every == 0)

    def _evaluate(self, index: int) -> None:
        """Scores the global weights, the last ones once they are saved; it belongs to no round."""
        fetched = self._fetch()
        variables = self._aggregator.params, self._aggregator.state
        if index + 1 == len(self._rounds):
            self._save(*variables)
        start_s = time.monotonic()
        score = self._evaluator.evaluate(*variables)
        self._tally.evaluated(
            index, score.accuracy, score.loss, time.monotonic() - start_s, fetched
        )

    def _fetch(self) -> Fetched:
        """Takes the parts of the model that live on compute nodes, which only evaluation needs."""
        start_s = time.monotonic()
        holders = [name for name in self._nodes if self.plan.local_stages(name)]
        for name in holders:
            self._members.send(name, {"type": "fetch"})
        nbytes = 0
        for name, mail in self._members.collect("fetched", holders).items():
            assert mail.message is not None
            nbytes += mail.message.nbytes
            part = bundle.part_of(self._arrays(name, mail), "part")
            self._aggregator.params.update(part["params"])
            self._aggregator.state.update(
                {unit: part["state"].get(unit, {}) for unit in part["params"]}
            )
        return Fetched(nbytes, time.monotonic() - start_s)
