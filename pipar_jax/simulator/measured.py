"""Costs taken from a trace: what a run measured of itself, as the input of a prediction."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from pipar_jax.errors import PlanError
from pipar_jax.plan import Plan, device_name
from pipar_jax.schedule import (
    AGGREGATE,
    ALL,
    COMPUTE,
    HAND_ON,
    RECEIVE_WEIGHTS,
    SEND_BACKWARD,
    SEND_FORWARD,
    SEND_WEIGHTS,
)
from pipar_jax.simulator.costs import Bytes, Costs, LinkModel, Seconds
from pipar_jax.trace import Timed, Trace

Key = tuple[int, int, str, int]

_TENSORS = (SEND_FORWARD, SEND_BACKWARD)
_WEIGHTS = (SEND_WEIGHTS, RECEIVE_WEIGHTS, HAND_ON)


def seconds_from_trace(trace: Trace, summary: Callable[[list[float]], float] = statistics.median
                       ) -> Seconds:  # fmt: skip
    """Returns the seconds of each kind of computation, as a trace shows them.

    Args:
      trace: The trace of a run, or of a part of it.
      summary: Makes one number of all the durations of a kind.
    """
    return _lookup(trace, lambda kind: kind in COMPUTE, lambda r: r.end_s - r.start_s, summary)


def bytes_from_trace(trace: Trace, weight_bytes: Mapping[int, float]) -> Bytes:
    """Returns the bytes of each kind of message, as a trace shows them.

    Args:
      trace: The trace of a run.
      weight_bytes: For each device the bytes of a message with weights or with its part, where the
        trace does not tell.
    """
    tensors = _lookup(trace, lambda kind: kind in _TENSORS, lambda r: r.nbytes, statistics.median)
    weights = {
        (row.action.device, row.action.kind): float(row.nbytes)
        for _, row in trace.rows()
        if row.action.kind in _WEIGHTS and row.nbytes
    }

    def wire_bytes(device: int, stage: int, kind: str, samples: int) -> float:
        if kind in _TENSORS:
            return tensors(device, stage, kind, samples)
        # One message carries all the stages that a device holds.
        known = weights.get((device, kind), weight_bytes.get(device, 0.0))
        return 0.0 if stage else known

    return wire_bytes


def costs_from_trace(
    trace: Trace,
    links: Mapping[tuple[str, str], LinkModel],
    weight_bytes: Mapping[int, float],
    window_bytes: float | None = None,
) -> Costs:
    """Returns costs with which a run's own trace is predicted.

    Args:
      trace: The trace of a run.
      links: What the links were shaped to.
      weight_bytes: For each device the bytes of a message with its weights.
      window_bytes: The links' credit.
    """
    return Costs(
        seconds_from_trace(trace), bytes_from_trace(trace, weight_bytes), links,
        window_bytes=window_bytes,
    )  # fmt: skip


def links_from_shapes(
    shapes: Mapping[int, tuple[LinkModel, LinkModel]], plan: Plan
) -> dict[tuple[str, str], LinkModel]:
    """Returns the directions of a two-host plan's links.

    Args:
      shapes: For each device its link up and down.
      plan: The plan; a device's link shapes what it sends to any host, and what it gets.
    """
    links = {}
    others = [host for host in plan.hosts() if host not in map(device_name, shapes)]
    for device, (up, down) in shapes.items():
        for other in others:
            links[device_name(device), other] = up
            links[other, device_name(device)] = down
    return links


def _lookup(
    trace: Trace,
    wanted: Callable[[str], bool],
    measure: Callable[[Timed], float],
    summary: Callable[[list[float]], float],
) -> Seconds:
    """Returns a function that finds one number for all rows of a device, stage, kind and size."""
    values: dict[Key, list[float]] = {}
    for _, row in trace.rows():
        action = row.action
        if wanted(action.kind):
            key = action.device, action.stage, action.kind, row.samples
            values.setdefault(key, []).append(measure(row))
    table = {key: summary(some) for key, some in values.items()}

    def find(device: int, stage: int, kind: str, samples: int) -> float:
        found = table.get((device, stage, kind, samples))
        if found is None:
            if kind == AGGREGATE and device == ALL:
                return 0.0  # a sequential round averages nothing
            raise PlanError(
                f"the trace has no {kind} of device {device}, stage {stage}, with {samples} "
                "samples: it is of another plan or incomplete"
            )
        return found

    return find
