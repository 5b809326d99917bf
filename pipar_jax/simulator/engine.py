"""The event loop: the runtime's dispatchers, driven by durations instead of computations."""

from __future__ import annotations

import dataclasses
import gc
import heapq
from collections.abc import Callable
from typing import Any

from pipar_jax.cost_model.costs import Costs, on_grid
from pipar_jax.schedule.actions import (
    BACKWARD,
    FORWARD,
    LOSS,
    MICRO,
    SEND_CLIENT_MODEL,
    UPDATE,
    Action,
    host_of,
)
from pipar_jax.schedule.dispatch import Demand, InFlightLimit
from pipar_jax.schedule.host_program import HostProgram, Operation
from pipar_jax.schedule.plan import COORDINATOR, Order, device_name
from pipar_jax.schedule.policies import policy
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.step_feeder import StepFeeder
from pipar_jax.schedule.trace import Interval, Timed, Trace
from pipar_jax.simulator import deadlock
from pipar_jax.simulator.exchange import Exchange
from pipar_jax.simulator.network import Direction, Route, SimulatedNetwork
from pipar_jax.simulator.round import SimulatedRound
from pipar_jax.simulator.state import REST_S, ComparableDispatcher, SimulatedHost
from pipar_jax.simulator.steady import Steady

Handler = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction of a round.

    Attributes:
      seconds: Time from the coordinator's release until it knows that the last weights are stored.
      busy_s: Seconds of computation by host.
      carried_bytes: Bytes on the wire by direction (from, to).
      actions: Number of actions in the round, including extrapolated ones.
      simulated: Number of simulated actions: the work of the prediction.
      left_out: Number of steps of each span that were extrapolated.
      trace: All timed actions; empty if they were not collected.
    """

    seconds: float
    busy_s: dict[str, float]
    carried_bytes: dict[tuple[str, str], float]
    actions: int
    simulated: int
    left_out: int
    trace: Trace

    def idle_share(self, host: str) -> float:
        """Returns the share of the round in which a host does not compute, in [0, 1]."""
        return 1.0 - self.busy_s[host] / self.seconds


def simulate(schedule: RoundSchedule, costs: Costs, *, collect: bool = True) -> Prediction:
    """Predicts one round.

    Args:
      schedule: The round's actions.
      costs: Their durations and sizes.
      collect: Whether to return the trace. Without it, steady states are detected and long rounds
        extrapolated, with exactly the same times.

    Raises:
      ScheduleError: The schedule cannot finish: it deadlocks.
    """
    simulation = Simulation(schedule, costs, collect=collect)
    # Actions are hundreds of thousands of tuples without reference cycles: garbage collection would
    # take a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return simulation.run()
    finally:
        if collecting:
            gc.enable()


class Simulation:
    """The simulation of a round.

    Attributes:
      now_s: Current time, without extrapolated time.
      costs: Durations and sizes.
      hosts: The hosts, in the plan's order.
      by_name: The hosts by name.
      network: Their links.
      round: The feeders of the hosts.
      exchange: The transfers of weights.
      events: Future events: (time, order, handler, arguments), a heap.
      actions: Number of started actions.
    """

    def __init__(self, schedule: RoundSchedule, costs: Costs, *, collect: bool) -> None:
        """See ``simulate``."""
        plan = schedule.plan
        self._plan, self.costs, self._collect = plan, costs, collect
        self.network = SimulatedNetwork(costs)
        self._routes: dict[tuple[int, int, str], Route] = {}
        self._limits: dict[tuple[str, int], InFlightLimit] = {}
        self.now_s = 0.0
        self.actions = 0
        self.events: list[tuple[float, int, Handler, tuple[Any, ...]]] = []
        self._order = 0
        rule = policy(plan.dispatch, self._work_per_step(schedule))
        self._programs = {name: HostProgram(plan, name) for name in plan.hosts()}
        needy = costs.window_bytes is not None or bool(plan.in_flight)
        self.hosts = []
        for i, (name, program) in enumerate(self._programs.items()):
            dispatcher = ComparableDispatcher(rule)
            feeder = StepFeeder(program, dispatcher, self._demand if needy else None)
            self.hosts.append(SimulatedHost(name, i, dispatcher, feeder))
        self.by_name = {host.name: host for host in self.hosts}
        self.round = SimulatedRound(schedule, {host.name: host.feeder for host in self.hosts})
        self._most_in_flight = 1 + costs.ahead
        self.exchange = Exchange(self, plan, costs, collect)
        self._steady = None
        if not collect and type(schedule) is RoundSchedule:
            self._steady = Steady(self, schedule)

    def run(self) -> Prediction:
        """Runs the round to its end.

        Raises:
          ScheduleError: It deadlocks.
        """
        self._release()
        events = self.events
        while events:
            self.now_s, _, handler, arguments = heapq.heappop(events)
            handler(*arguments)
        if self._unfinished():
            raise deadlock.describe(self._plan, self.hosts, self.actions)
        return self._predict()

    def _unfinished(self) -> bool:
        """Returns whether part of the round can never happen."""
        if not self.round.finished or any(host.dispatcher.waiting() for host in self.hosts):
            return True
        return not self.exchange.finished

    def at(self, time_s: float, handler: Handler, *arguments: Any) -> None:
        """Schedules an event."""
        self._order += 1
        heapq.heappush(self.events, (time_s, self._order, handler, arguments))

    # --- the round's beginning and end --------------------------------------------------------

    def _release(self) -> None:
        """Releases all hosts; in sequential order the first device gets the client-side model."""
        for host in self.hosts:
            at_s = self.network.control(COORDINATOR, 0.0, host.name)
            self.at(at_s, self._start, host)
        if self._plan.order == Order.SEQUENTIAL and self.round.schedule.spans:
            span = self.round.schedule.spans[0]
            if self.round.schedule.holder != span.device:
                self.exchange.give_part(span.device, span.first)

    def _start(self, host: SimulatedHost) -> None:
        """Begins the round on a host."""
        host.feeder.start(self.round.schedule)
        self._pump(host)

    # --- dispatch -----------------------------------------------------------------------------

    def _pump(self, host: SimulatedHost) -> None:
        """Dispatches ready actions while a host may dispatch ahead."""
        while host.in_flight < self._most_in_flight:
            action = host.dispatcher.next()
            if action is None:
                return
            kind = action.kind
            route = self._routes.get((action.device, action.stage, kind)) or self._route(action)
            samples = 0
            if kind in MICRO:
                samples = host.feeder.sizes(action.device, action.step)[action.micro_batch]
            seconds = route.cost(samples)[0]
            start_s = host.free_s if host.free_s > self.now_s else self.now_s
            if self.costs.after_rest_s is not None:
                if start_s - host.free_s > REST_S:
                    host.warm.clear()
                if (action.stage, kind) not in host.warm:
                    host.warm.add((action.stage, kind))
                    seconds += route.after_rest_s
            end_s = host.free_s = start_s + seconds
            host.busy_s += seconds
            host.in_flight += 1
            host.last.append(action)
            self.actions += 1
            self._order += 1
            heapq.heappush(
                self.events,
                (end_s, self._order, self._computed, (host, action, route, samples, start_s)),
            )
            host.feeder.dispatched(action)

    def _computed(
        self, host: SimulatedHost, action: Action, route: Route, samples: int, start_s: float
    ) -> None:
        """Ends a computation: releases its input and sends its result."""
        host.in_flight -= 1
        if self._collect:
            host.rows.append(Timed(action, start_s, self.now_s, 0, samples))
        host.dispatcher.finish(action)
        if route.source is not None:
            self._release_credit(route.source, route.cost(samples)[2])
        if route.out is not None:
            self._send(host, action, route, samples)
        if action.kind is UPDATE:
            self._updated(action, route)
        elif action.kind is SEND_CLIENT_MODEL:
            self.exchange.hand_on(action)
        self._pump(host)

    def _updated(self, action: Action, route: Route) -> None:
        """Checks whether an update ends the round or a repetition."""
        if self._plan.order == Order.PARALLEL:
            if action in self.round.last_updates:
                self.exchange.over(action)
        else:
            self.exchange.stored(route.operation.host)
        if self._steady is not None and not action.stage:
            self._steady.observe(action)

    def _send(self, host: SimulatedHost, action: Action, route: Route, samples: int) -> None:
        """Sends a result; it is available when its last byte has arrived and is decoded."""
        link, operation = route.out, route.operation
        assert link is not None
        nbytes = route.cost(samples)[1]
        link.outstanding += nbytes
        target = self.by_name[link.target]
        ready_s = self.now_s
        codec_s = self.costs.codec_s
        if codec_s is not None:
            coding_s = codec_s(action.device, action.stage, operation.sent, samples)
            host.codec_free_s = ready_s = max(ready_s, host.codec_free_s) + on_grid(coding_s)
        start_s, end_s = link.send(ready_s, nbytes)
        there_s = end_s + link.delay_s
        received = Action(
            operation.target_stage,
            operation.arrives_as,
            action.device,
            action.step,
            action.micro_batch,
        )
        if self._collect:
            sent = action._replace(kind=operation.sent)
            host.rows.append(Timed(sent, start_s, end_s, int(nbytes), samples))
            target.rows.append(
                Timed(received, start_s + link.delay_s, there_s, int(nbytes), samples)
            )
        self.actions += 2
        if codec_s is None:
            self.at(there_s, self.arrive, target, received)
        else:
            self.at(there_s, self._decode, target, received, samples)

    def _decode(self, host: SimulatedHost, received: Action, samples: int) -> None:
        """Decodes a tensor that has arrived."""
        assert self.costs.codec_s is not None
        seconds = self.costs.codec_s(received.device, received.stage, received.kind, samples)
        host.codec_free_s = max(self.now_s, host.codec_free_s) + on_grid(seconds)
        self.at(host.codec_free_s, self.arrive, host, received)

    def arrive(self, host: SimulatedHost, received: Action) -> None:
        """Reports an input to a host's dispatcher."""
        host.dispatcher.complete(received)
        if host.in_flight < self._most_in_flight:
            self._pump(host)

    def _release_credit(self, link: Direction, nbytes: float) -> None:
        """Returns credit, for which the sender may have waited."""
        if self.costs.window_bytes is None:
            link.outstanding -= nbytes
            return
        at_s = self.network.control(link.target, self.now_s, link.source)
        self.at(at_s, self._credit, link, nbytes)

    def _credit(self, link: Direction, nbytes: float) -> None:
        link.outstanding -= nbytes
        self._pump(self.by_name[link.source])

    # --- small things -------------------------------------------------------------------------

    def _work_per_step(self, schedule: RoundSchedule) -> dict[int, float]:
        """Returns the seconds of each device's own computations in a step."""
        demand = {}
        for span in schedule.spans:
            chain = schedule.plan.devices[span.device]
            own = device_name(span.device)
            seconds = 0.0
            for stage in range(chain.stages):
                if schedule.plan.host(span.device, stage) != own:
                    continue
                kinds = (LOSS,) if stage == chain.stages - 1 else (FORWARD, BACKWARD)
                for samples in schedule.sizes(span.device, span.first):
                    for kind in kinds:
                        seconds += self.costs.compute_s(span.device, stage, kind, samples)
                seconds += self.costs.compute_s(span.device, stage, UPDATE, 0)
            demand[span.device] = seconds
        return demand

    def _route(self, action: Action) -> Route:
        """Creates the route of a kind of action on first use."""
        key = action.device, action.stage, action.kind
        host = host_of(self._plan, action)
        route = self._routes[key] = Route(
            self._programs[host].operation(*key), self.network, self.costs
        )
        return route

    def _demand(self, operation: Operation, samples: int) -> Demand | None:
        """Returns the credit and the limit that an operation of a size needs."""
        limit = link = None
        nbytes = 0.0
        if operation.limited:
            key = operation.host, operation.stage
            limit = self._limits.setdefault(key, InFlightLimit(self._plan.in_flight))
        if self.costs.window_bytes is not None and operation.target is not None:
            key_ = operation.place, operation.stage, operation.kind
            route = self._routes.get(key_) or Route(operation, self.network, self.costs)
            self._routes[key_] = route
            assert route.out is not None
            link, nbytes = route.out.credited, route.cost(samples)[1]
        if limit is None and link is None:
            return None
        return Demand(link, nbytes, limit)

    def _predict(self) -> Prediction:
        """Returns the prediction."""
        offset_s, left_out, simulated = 0.0, 0, self.actions
        busy = {host.name: host.busy_s for host in self.hosts}
        carried = self.network.carried()
        if self._steady is not None:
            offset_s, left_out = self._steady.offset_s, self._steady.left_out
            for name, seconds in self._steady.busy_s.items():
                busy[name] += seconds
            for ends, nbytes in self._steady.carried.items():
                carried[ends] += nbytes
            self.actions += self._steady.actions
        seconds = self.exchange.stored_s + offset_s
        trace = Trace()
        if self._collect:
            rows = {
                host.name: sorted(host.rows, key=lambda row: row.start_s) for host in self.hosts
            }
            trace = Trace(rows, [Interval(0.0, seconds)], {"plan": self._plan.to_dict()})
        return Prediction(seconds, busy, carried, self.actions, simulated, left_out, trace)
