"""Learns a device during training, from sums over stages, with replay.

Training times stages, not units: an observation is a sum over the units of the current cut. Each
case (kind, units and size) keeps its last few times; every update replays all cases with decreasing
weights, so that a new cut does not erase what was learned from an old one. A change of a device's
pace (it becomes hot or busy) shows in cases that were timed before; all records are then rescaled
to the new pace.
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
from pipar_jax.profiling.predictor.reference import LEAST_S, MOST_S, ReferenceTimes
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, ActionKind
from stages import Model

#: Number of times kept per case; their median is used.
KEPT = 5
#: Maximum number of cases; beyond it the least recent one is dropped.
CASES = 256
#: Factor from which a change of pace is not considered noise.
PACE = 1.15
#: Bound of the factor by which a device's pace may have changed since it was measured.
MOST_PACE = 1e6
#: Number of updates after which the weight of a case without new times has halved.
FADING = 8.0

#: A case: F, B or L, first unit, one past the last, samples.
Case = tuple[ActionKind, int, int, int]


class Learner:
    """Learns the parameters of one device.

    Attributes:
      device: The current estimate.

    Args:
      model: The model in training.
      reference: The device's times of the reference layers, including its emulated slowdown.
      weights: The shared network; None is that of the package.
      tables: The model's operators, if known.
    """

    def __init__(
        self,
        model: Model,
        reference: ReferenceTimes,
        weights: Weights | None = None,
        tables: Tables | None = None,
    ) -> None:
        self._model, self._measured, self._reference = model, reference, reference
        self._pace = 1.0  # of the reference times now to the measured ones
        self._weights = load() if weights is None else weights
        self._first = reference.observations()
        self._times: dict[Case, collections.deque[float]] = {}
        self._fresh: dict[Case, list[float]] = collections.defaultdict(list)
        self._seen: dict[Case, int] = {}
        self._updates = 0
        self._tables = tables or Tables(model)
        self.device: Device = fit(self._weights, self._first)

    def observe(self, case: Case, seconds: float) -> None:
        """Records the duration of a stage for ``learn``.

        Args:
          case: Kind (F, B, L), first unit, one past the last, samples.
          seconds: Duration.
        """
        if seconds < LEAST_S:
            return  # below the resolution of the clock
        self._fresh[case].append(min(seconds, MOST_S))

    def learn(self) -> Device:
        """Replays all records and returns the new estimate."""
        self._updates += 1
        self._keep_pace()
        for case, times in self._fresh.items():
            kept = self._times.setdefault(case, collections.deque(maxlen=KEPT))
            kept.append(statistics.median(times))
            self._seen[case] = self._updates
        self._fresh.clear()
        for case in sorted(self._seen, key=lambda one: self._seen[one])[:-CASES]:
            del self._times[case], self._seen[case]
        # The reference times remain an anchor, since they are those of single layers.
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
        """Rescales all records to the device's current pace."""
        changes = [
            statistics.median(times) / statistics.median(self._times[case])
            for case, times in self._fresh.items()
            if case in self._times
        ]
        factor = statistics.median(changes) if changes else 1.0
        if 1 / PACE < factor < PACE:
            return
        self._pace = min(max(self._pace * factor, 1 / MOST_PACE), MOST_PACE)
        self._reference = self._measured.slowed(self._pace)
        self._first = self._reference.observations()
        for kept in self._times.values():
            for index, seconds in enumerate(kept):
                kept[index] = min(max(seconds * factor, LEAST_S), MOST_S)

    def predict_s(self, case: Case) -> float:
        """Returns the estimated duration of a stage."""
        kind, first, stop, samples = case
        tables = self._stage(first, stop, samples)
        heads = {
            FORWARD: [(FORWARD_HEAD, tables)],
            BACKWARD: [(BACKWARD_HEAD, tables)],
            LOSS: [(FORWARD_HEAD, tables), (BACKWARD_HEAD, [tables[0][1:], *tables[1:]])],
        }[kind]
        return float(sum(self.device.units_s(some, head, first).sum() for head, some in heads))

    @property
    def cases(self) -> tuple[Case, ...]:
        """The stages whose durations are remembered, oldest first."""
        return tuple(self._times)

    def profile(self, sizes: Sequence[int]) -> HostProfile:
        """Returns the device's times of all units, for the tuner.

        Args:
          sizes: Micro-batch sizes, increasing.
        """
        reference = self._reference.slowed(self.device.pace)
        return predict_host(self._model, sizes, reference, device=self.device, tables=self._tables)

    def _faded(self, age: int) -> float:
        """Returns the weight of a time by its age in updates."""
        return float(0.5 ** (max(age - 1, 0) / FADING))

    def _stage(self, first: int, stop: int, samples: int) -> list[Array]:
        """Returns the operators of a stage's units, with a single call."""
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
