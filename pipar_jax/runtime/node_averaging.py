"""Averages devices' copies of stages in place where they live together on a compute node."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

import jax

from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import AggregationConfig
from pipar_jax.protocol.values import EVERY
from pipar_jax.runtime.unit_state import Key, UnitState, take
from pipar_jax.schedule.actions import AGGREGATE, ALL, Action, Span
from pipar_jax.schedule.host_program import HostProgram
from pipar_jax.schedule.plan import WeightPolicy
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.trace import Timed
from pipar_jax.training.replica import Replica
from stages.trees import Arrays, Variables


class Averaging:
    """A node's part of an aggregation, for which no weights are sent.

    Attributes:
      stages: The stages whose weights live together on the host.

    Args:
      aggregation: The rule.
      program: The host's program under the run's plan.
      replicas: The host's replicas by slot.
      params: The global weights to begin with, by unit.
      state: Their batch statistics.
    """

    def __init__(
        self,
        aggregation: AggregationConfig,
        program: HostProgram,
        replicas: Mapping[tuple[int, int], Replica],
        params: Mapping[str, Arrays],
        state: Mapping[str, Arrays],
    ) -> None:
        self._aggregation, self._program, self._replicas = aggregation, program, replicas
        plan = program.plan
        self.stages = plan.local_stages(program.host)
        self._aggregators: dict[int, Aggregator] = {}
        # Shared weights have a single copy, and need no average.
        if plan.weights == WeightPolicy.COPY:
            for stage in self.stages:
                names = replicas[program.replica_key(0, stage)].stage.unit_names
                self._aggregators[stage] = Aggregator(
                    aggregation,
                    {name: params[name] for name in names},
                    {name: state[name] for name in names},
                )

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps between rounds, without the replicas."""
        return sum(one.nbytes for one in self._aggregators.values())

    @classmethod
    def after(
        cls,
        aggregation: AggregationConfig,
        program: HostProgram,
        replicas: Mapping[tuple[int, int], Replica],
        before: Mapping[str, Aggregator],
        arrived: Mapping[Key, UnitState],
    ) -> Averaging:
        """Returns the averaging under a new plan, between two rounds, when all copies are equal.

        Args:
          aggregation: The rule.
          program: The host's program under the new plan.
          replicas: The host's replicas by slot, under the new plan.
          before: The previous aggregator of each unit that was averaged here.
          arrived: The rule's states of the other units.

        Raises:
          RunError: An arrived state does not fit.
        """
        params: Variables = {}
        state: Variables = {}
        if program.plan.weights == WeightPolicy.COPY:
            for stage in program.plan.local_stages(program.host):
                replica = replicas[program.replica_key(0, stage)]  # updates donate its own arrays
                params |= jax.device_put(replica.params, may_alias=False)
                state |= jax.device_put(replica.state, may_alias=False)
        made = cls(aggregation, program, replicas, params, state)
        for unit, aggregator in made.units():
            if unit in before:
                aggregator.rule_state[unit] = before[unit].rule_state[unit]
            else:
                came = UnitState(rule=arrived[EVERY, unit].rule)
                take(aggregator, {(EVERY, unit): came}, program.host)
        return made

    def units(self) -> Iterator[tuple[str, Aggregator]]:
        """Yields every unit that is averaged here, with its aggregator."""
        for aggregator in self._aggregators.values():
            for unit in aggregator.params:
                yield unit, aggregator

    def compile(self) -> None:
        """Compiles the average before the first round."""
        for aggregator in self._aggregators.values():
            aggregator.compile()

    def run(self, schedule: RoundSchedule, places: Collection[int], slowdown: float) -> Timed:
        """Averages, begins the next round's weights, and returns the timed action.

        Args:
          schedule: The round that is over.
          places: The places whose copies count; the others only receive the average.
          slowdown: Emulated slowness of this host.
        """
        start_s = time.monotonic()
        for stage in self.stages:
            average = self._aggregators.get(stage)
            if average is not None:
                average.aggregate(
                    [
                        Contribution(one.params, one.state, self._weight(schedule, span))
                        for span in schedule.spans
                        if span.stop > span.first and span.device in places
                        for one in [self._replicas[span.device, stage]]
                    ]
                )
            for (_, index), replica in self._replicas.items():
                if index == stage:
                    if average is not None:
                        replica.load(average.params, average.state)
                    replica.renew_anchor()
        jax.block_until_ready(  # type: ignore[no-untyped-call]
            [(replica.params, replica.state) for replica in self._replicas.values()]
        )
        spent_s = time.monotonic() - start_s
        time.sleep(spent_s * (slowdown - 1.0))
        action = Action(self.stages[0], AGGREGATE, ALL, schedule.spans[0].stop - 1)
        return Timed(action, start_s, time.monotonic())

    def _weight(self, schedule: RoundSchedule, span: Span) -> float:
        return float(schedule.trained_samples(span)) if self._aggregation.weighted else 1.0
