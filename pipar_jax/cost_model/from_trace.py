"""Costs from the trace of a run, as input of a prediction."""

from __future__ import annotations

import array
import statistics
from collections.abc import Callable, Mapping

from pipar_jax.cost_model.costs import Bytes, Costs, LinkModel, Seconds
from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import (
    AGGREGATE,
    ALL,
    COMPUTE,
    RECEIVE_WEIGHTS,
    SEND_BACKWARD,
    SEND_CLIENT_MODEL,
    SEND_FORWARD,
    SEND_WEIGHTS,
    ActionKind,
)
from pipar_jax.schedule.trace import Trace

Key = tuple[int, int, str, int]
Summary = Callable[[list[float]], float]

_TENSORS = (SEND_FORWARD, SEND_BACKWARD)
_WEIGHTS = (SEND_WEIGHTS, RECEIVE_WEIGHTS, SEND_CLIENT_MODEL)


class Observed:
    """Durations of computations and sizes of messages in a trace or in several parts of one."""

    def __init__(self) -> None:
        """Creates an empty collection."""
        self._seconds: dict[Key, array.array[float]] = {}
        self._bytes: dict[Key, array.array[float]] = {}
        self._weights: dict[tuple[int, str], float] = {}

    def add(self, trace: Trace) -> None:
        """Adds a trace or a part of one."""
        for _, row in trace.rows():
            action = row.action
            key = action.device, action.stage, action.kind, row.samples
            if action.kind in COMPUTE:
                self._seconds.setdefault(key, array.array("d")).append(row.end_s - row.start_s)
            elif action.kind in _TENSORS:
                self._bytes.setdefault(key, array.array("d")).append(row.nbytes)
            elif action.kind in _WEIGHTS and row.nbytes:
                self._weights[action.device, action.kind] = float(row.nbytes)

    def seconds(self, summary: Summary = statistics.median) -> Seconds:
        """Returns the seconds of each kind of computation.

        Args:
          summary: Reduces the durations of a kind to one number.
        """
        return _lookup(self._seconds, summary)

    def wire_bytes(self, weight_bytes: Mapping[int, float]) -> Bytes:
        """Returns the bytes of each kind of message.

        Args:
          weight_bytes: Bytes of a message with weights or the client-side model, by device, which
            the trace does not contain.
        """
        tensors, weights = _lookup(self._bytes, statistics.median), dict(self._weights)

        def wire_bytes(device: int, stage: int, kind: ActionKind, samples: int) -> float:
            if kind in _TENSORS:
                return tensors(device, stage, kind, samples)
            # One message contains all stages of a device.
            known = weights.get((device, kind), weight_bytes.get(device, 0.0))
            return 0.0 if stage else known

        return wire_bytes

    def costs(
        self,
        links: Mapping[tuple[str, str], LinkModel],
        weight_bytes: Mapping[int, float],
        window_bytes: float | None = None,
    ) -> Costs:
        """Returns the costs for predicting the run itself.

        Args:
          links: Model of each emulated link.
          weight_bytes: Bytes of a message with weights, by device.
          window_bytes: The links' credit.
        """
        return Costs(
            self.seconds(), self.wire_bytes(weight_bytes), links, window_bytes=window_bytes
        )


def observed(trace: Trace) -> Observed:
    """Returns the collection of a whole trace."""
    observed = Observed()
    observed.add(trace)
    return observed


def _lookup(values: Mapping[Key, array.array[float]], summary: Summary) -> Seconds:
    """Returns a function from device, stage, kind and samples to one number."""
    table = {key: summary(list(some)) for key, some in values.items()}

    def find(device: int, stage: int, kind: ActionKind, samples: int) -> float:
        times = table.get((device, stage, kind, samples))
        if times is None:
            if kind == AGGREGATE and device == ALL:
                return 0.0  # a sequential round has no average
            raise PlanError(
                f"the trace has no {kind} of device {device}, stage {stage}, with {samples} "
                "samples: it belongs to another plan or is incomplete"
            )
        return times

    return find
