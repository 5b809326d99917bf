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

from pipar_jax.plan import Plan
from pipar_jax.predictor.device import Device, Observation, fit
from pipar_jax.predictor.hosts import predict_host, stage_table
from pipar_jax.predictor.network import Weights, load
from pipar_jax.predictor.operators import Tables
from pipar_jax.predictor.reference import ReferenceTimes
from pipar_jax.profile import HostProfile
from pipar_jax.schedule import BACKWARD, FORWARD, LAST
from pipar_jax.trace import Trace
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
        """See the class."""
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
            if action.kind not in (FORWARD, BACKWARD, LAST) or action.device < 0:
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
        self.device = fit(self._weights, observations, self.device)
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
        one = self._observation(case, 1.0, 1.0)
        return float(
            self.device.operator_s(one.forward, 0).sum()
            + self.device.operator_s(one.backward, 1).sum()
        )

    def profile(self, sizes: Sequence[int]) -> HostProfile:
        """Returns the device's times of all units, for the tuner.

        Args:
          sizes: Micro-batch sizes, rising.
        """
        return predict_host(
            self._model, sizes, self._reference, device=self.device, tables=self._tables
        )

    def _faded(self, age: int) -> float:
        """Returns how much a time counts that is so many updates old."""
        return float(0.5 ** (max(age - 1, 0) / FADING))

    def _observation(self, case: Case, seconds: float, weight: float) -> Observation:
        kind, first, stop, samples = case
        table = stage_table(self._tables.at(samples)[first:stop])
        if kind == FORWARD:
            return Observation(table, table[:0], seconds, weight)
        if kind == BACKWARD:
            return Observation(table[:0], table, seconds, weight)
        return Observation(table, table[1:], seconds, weight)  # forward and backward in one call
