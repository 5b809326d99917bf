"""Learning a device while it trains: from sums over stages, with replay.

A training times stages, not units: what is seen is a sum over the units of whatever cut is in use.
Each case (what of which units at which size) keeps its last few times; every update replays all
cases, so that a new cut does not make the device forget an old one, and what was seen long ago
counts less. A device that changes its pace (it gets hot, or busy) shows it in cases that it was
timed in before: then everything remembered is brought to the new pace.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence

import numpy as np

from pipar_jax.cost_model.profile import HostProfile
from pipar_jax.profiling.predictor.device_fit import (
    BACKWARD_HEAD,
    FORWARD_HEAD,
    Device,
    Observation,
    fit,
)
from pipar_jax.profiling.predictor.latency_model import Weights, load
from pipar_jax.profiling.predictor.operators import Array, Tables
from pipar_jax.profiling.predictor.predict_host import one_call, predict_host
from pipar_jax.profiling.predictor.reference import ReferenceTimes
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS
from pipar_jax.schedule.plan import Plan
from pipar_jax.schedule.trace import Trace
from stages import Model

#: Times that each case keeps, of which the median counts.
KEPT = 5
#: Cases that are remembered; beyond, the one seen longest ago is forgotten.
CASES = 256
#: The change of pace, as a factor, from which on it is taken for one and not for noise.
PACE = 1.15
#: Updates after which a case that was not seen again counts half.
FADING = 8.0

#: What was timed: F, B or L, first unit, one past the last, samples.
Case = tuple[str, int, int, int]


class Learner:
    """What is known of one device, and how it becomes more.

    Attributes:
      device: What is known by now.

    Args:
      model: The model in training.
      reference: The device's times of the reference layers, emulated slowness included.
      weights: The shared network; None is the shipped one.
      tables: The model's operators, if they are known already.
    """

    def __init__(
        self,
        model: Model,
        reference: ReferenceTimes,
        weights: Weights | None = None,
        tables: Tables | None = None,
    ) -> None:
        self._model, self._reference = model, reference
        self._weights = load() if weights is None else weights
        self._first = reference.observations()
        self._times: dict[Case, collections.deque[float]] = {}
        self._fresh: dict[Case, list[float]] = collections.defaultdict(list)
        self._seen: dict[Case, int] = {}
        self._updates = 0
        self._tables = tables or Tables(model)
        self.device: Device = fit(self._weights, self._first)

    def observe(self, case: Case, seconds: float) -> None:
        """Notes how long a stage took; ``learn`` makes use of it.

        Args:
          case: Kind (F, B, L), first unit, one past the last, samples.
          seconds: How long it took.
        """
        if seconds <= 0:
            return  # the clock did not see it
        self._fresh[case].append(seconds)

    def observe_trace(self, trace: Trace, plan: Plan, host: str) -> int:
        """Notes all stage times of a host in a trace; returns how many cases it had.

        Args:
          trace: The trace of a run, or of a round.
          plan: The plan that it was made under.
          host: The host whose device this is.
        """
        found: dict[Case, list[float]] = collections.defaultdict(list)
        for row in trace.hosts.get(host, ()):
            action = row.action
            if action.kind not in (FORWARD, BACKWARD, LOSS) or action.device < 0:
                continue
            bounds = (0, *plan.devices[action.device].cuts, len(self._model.units))
            first, stop = bounds[action.stage : action.stage + 2]
            found[action.kind, first, stop, row.samples].append(row.end_s - row.start_s)
        for case, seconds in found.items():
            self.observe(case, statistics.median(seconds))
        return len(found)

    def learn(self) -> Device:
        """Replays what was noted and returns what the device is taken for now."""
        self._updates += 1
        self._keep_pace()
        for case, times in self._fresh.items():
            kept = self._times.setdefault(case, collections.deque(maxlen=KEPT))
            kept.append(statistics.median(times))
            self._seen[case] = self._updates
        self._fresh.clear()
        for case in sorted(self._seen, key=lambda one: self._seen[one])[:-CASES]:
            del self._times[case], self._seen[case]
        # What it said of itself at first stays an anchor, since it is about single layers.
        anchor = max(0.25, self._faded(self._updates))
        observations = [one._replace(weight=anchor) for one in self._first]
        for case, kept in self._times.items():
            observations.append(
                self._observation(
                    case, statistics.median(kept), self._faded(self._updates - self._seen[case])
                )
            )
        self.device = fit(self._weights, observations, self.device, len(self._model.units))
        return self.device

    def _keep_pace(self) -> None:
        """Brings what is remembered to the device's present pace."""
        changes = [
            statistics.median(times) / statistics.median(self._times[case])
            for case, times in self._fresh.items()
            if case in self._times
        ]
        factor = statistics.median(changes) if changes else 1.0
        if 1 / PACE < factor < PACE:
            return
        self._reference = self._reference.slowed(factor)
        self._first = self._reference.observations()
        for kept in self._times.values():
            for index, seconds in enumerate(kept):
                kept[index] = seconds * factor

    def predict_s(self, case: Case) -> float:
        """Returns how long a stage takes, as far as is known."""
        kind, first, stop, samples = case
        tables = self._stage(first, stop, samples)
        heads = {
            FORWARD: [(FORWARD_HEAD, tables)],
            BACKWARD: [(BACKWARD_HEAD, tables)],
            LOSS: [(FORWARD_HEAD, tables), (BACKWARD_HEAD, [tables[0][1:], *tables[1:]])],
        }[kind]
        return float(sum(self.device.units_s(some, head, first).sum() for head, some in heads))

    def profile(self, sizes: Sequence[int]) -> HostProfile:
        """Returns the device's times of all units, for the tuner.

        Args:
          sizes: Micro-batch sizes, rising.
        """
        reference = self._reference.slowed(self.device.pace)
        return predict_host(self._model, sizes, reference, device=self.device, tables=self._tables)

    def _faded(self, age: int) -> float:
        """Returns how much a time counts that is so many updates old."""
        return float(0.5 ** (max(age - 1, 0) / FADING))

    def _stage(self, first: int, stop: int, samples: int) -> list[Array]:
        """Returns the operators of a stage's units, with one call in all."""
        return one_call(self._tables.at(samples)[first:stop])

    def _observation(self, case: Case, seconds: float, weight: float) -> Observation:
        kind, first, stop, samples = case
        tables = self._stage(first, stop, samples)
        table = np.concatenate(tables)
        units = np.repeat(np.arange(first, stop), [len(one) for one in tables])
        nothing = table[:0], units[:0]
        # A last stage's forward and backward are one call.
        forward = nothing if kind == BACKWARD else (table, units)
        backward = nothing if kind == FORWARD else (table, units)
        if kind == LOSS:
            backward = table[1:], units[1:]
        return Observation(
            forward[0], backward[0], seconds, weight, units=(forward[1], backward[1])
        )
