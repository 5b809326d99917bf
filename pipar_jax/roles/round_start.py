"""Brings the devices of a cohort to the start of a round: their steps, places and weights."""

from __future__ import annotations

from collections.abc import Sequence

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import AggregationConfig, OptimizerConfig
from pipar_jax.protocol import messages
from pipar_jax.roles.gathering import Cohort
from pipar_jax.roles.host_setup import HostSetup
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.timetable import Timetable, Turn
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.unit_state import States, UnitState
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import Order, device_name
from pipar_jax.training import optimizer
from stages.trees import Variables


class RoundStart:
    """What devices have when a round begins.

    Attributes:
      until: Where gradients are summed, the step at which a round that was cut short ends.

    Args:
      names: The model's units in order.
      optimizer_config: The devices' optimiser.
      aggregation: How their weights are averaged.
      host: The host in this process.
      members: The devices and compute nodes.
      setup: The hosts under the plan in force.
      aggregator: The coordinator's.
      states: Moves states between the hosts.
      table: Who takes which steps.
      personal: The personal weights with which hosts begin.
    """

    def __init__(
        self,
        names: Sequence[str],
        optimizer_config: OptimizerConfig,
        aggregation: AggregationConfig,
        host: Host,
        members: Membership,
        setup: HostSetup,
        aggregator: Aggregator,
        states: StateExchange,
        table: Timetable,
        personal: Variables,
    ) -> None:
        self._names, self._host, self._members, self._setup = names, host, members, setup
        self._aggregator, self._states, self._table = aggregator, states, table
        self._personal = personal
        # For the states with which replicas begin: they do not depend on the number of steps.
        self._optimizer = optimizer.build(
            optimizer_config, steps=optimizer.MANY_STEPS, proximal_mu=aggregation.proximal_mu
        )
        self._seats_before: dict[str, str] = {}  # of each device, in the rounds before this one
        self.until: int | None = None

    def spans(self, index: int, cohort: Cohort) -> tuple[Span, ...]:
        """Returns the steps of a round by place.

        Args:
          index: The round.
          cohort: Its devices, and what a script says of it.
        """
        if cohort.planned is not None:
            return tuple(Span(*span) for span in cohort.planned.spans)
        if self._setup.plan.sums_gradients:  # all are at the same step, whoever was away
            step = max(device.step for device in self._members.population)
            for place in cohort.taking:
                self._members.population[cohort.devices[place]].step = step
        turns = []
        for place in cohort.taking:
            device = self._members.population[cohort.devices[place]]
            turns.append(Turn(place, device.step, device.steps))
        spans = self._table.spans(index, turns)
        if self.until is None:
            return spans
        return tuple(span._replace(stop=min(span.stop, self.until)) for span in spans)

    def seat(self, cohort: Cohort) -> None:
        """Gives each device of a round its place: its samples, and its link on this host."""
        if self._members.hosts.sampled:
            samples = list(self._setup.samples)
            for place in cohort.taking:
                samples[place] = self._members.population[cohort.devices[place]].samples
            self._setup.samples = tuple(samples)
        links = {device_name(place): device_name(cohort.devices[place]) for place in cohort.taking}
        self._seats_before |= self._members.links.seats
        self._members.links.seats = {name: seat for seat, name in links.items()}
        control = self._host.link_table.control
        for seat, name in links.items():
            if name in self._members.by_name:
                control[seat] = self._members.by_name[name].link

    def bring_up_to_date(self, cohort: Cohort) -> tuple[int, ...]:
        """Gives the weights of the moment to those that have others; returns who is fresh.

        In sequential order the client-side model comes with a device's turn.
        """
        fresh = []
        late = []
        scripted = () if cohort.planned is None else cohort.planned.fresh
        for place in cohort.taking:
            index = cohort.devices[place]
            device, name = self._members.population[index], device_name(index)
            if not device.ready:  # it is gone since it was chosen, and may be back
                continue
            # In the run that a script tells of it had come back; here it has been there all along.
            renews = place in scripted and not device.fresh
            if renews or (device.fresh and device.rounds):
                fresh.append(place)
            if self._setup.plan.order == Order.SEQUENTIAL or (device.current and not renews):
                continue
            before = self._seats_before.get(name, device_name(0))
            seat = before if self._members.hosts.sampled else device_name(place)
            states = self._current_states(seat, optimizers=renews)
            self._states.push(name, states, messages.PushState(optimizers=renews))
            late.append(name)
        self._members.collect(messages.PushedState, late)
        return tuple(fresh)

    def initial_client_model(self) -> States:
        """Returns the client-side model as every device makes it from the seed."""
        wanted = exchanges.client_model(self._setup.plan, 0, self._names)
        params, state = self._aggregator.params, self._aggregator.state
        return {
            (copy, unit): UnitState(params[unit], state[unit], self._optimizer.init(params[unit]))
            for copy, unit in wanted
        }

    def _current_states(self, seat: str, *, optimizers: bool) -> States:
        """Returns the weights of the moment of a device, with fresh optimiser states if wanted."""
        wanted = exchanges.whole(self._setup.plan, seat, self._names, optimizers=False)
        states = unit_state.known(wanted, self._aggregator)
        if optimizers:
            init = self._optimizer.init
            for key in exchanges.optimizer_states(self._setup.plan, seat, self._names):
                weights = {**self._personal.get(key[1], {}), **self._aggregator.params[key[1]]}
                states[key] = UnitState(opt=init(weights))
        return states
