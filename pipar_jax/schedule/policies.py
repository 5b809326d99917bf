"""Dispatch policies: in which order a host runs its ready actions; registered by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, Action

#: A sort key; the smallest runs first.
Key = tuple[float, ...]
#: Takes an action and how many became ready before it.
Policy = Callable[[Action, int], Key]


def _fcfs(demand: Mapping[int, float]) -> Policy:
    """Runs what became ready first."""
    del demand
    return lambda action, ready: (ready,)


def _backward_first(demand: Mapping[int, float]) -> Policy:
    """Prefers updates and backwards, which free residuals and let devices go on."""
    del demand
    urgency = {UPDATE: 0, BACKWARD: 1, LOSS: 1}
    return lambda action, ready: (urgency.get(action.kind, 2), ready)


def _slowest_first(demand: Mapping[int, float]) -> Policy:
    """Serves the device with the longest demand first (the priority of PipeSFL)."""
    # Looked up when an action becomes ready: the demand changes from round to round.
    return lambda action, ready: (-demand.get(action.device, 0.0), ready)


def _fixed(demand: Mapping[int, float]) -> Policy:
    """Runs a step's forwards in micro-batch order, then its backwards, devices in order."""
    del demand
    phase = {FORWARD: 0, LOSS: 0, BACKWARD: 1}
    return lambda action, ready: (
        action.step, phase.get(action.kind, 2), action.micro_batch, action.device, ready,
    )  # fmt: skip


#: Every policy: what makes it from each device's seconds of work per step.
POLICIES: dict[str, Callable[[Mapping[int, float]], Policy]] = {
    "fcfs": _fcfs,
    "backward_first": _backward_first,
    "slowest_first": _slowest_first,
    "fixed": _fixed,
}


def policy(name: str, demand: Mapping[int, float] | None = None) -> Policy:
    """Returns the policy of a name.

    Args:
      name: One of ``POLICIES``.
      demand: Seconds of work per step of each device; the policy reads it whenever it is used.

    Raises:
      PlanError: There is no policy of this name.
    """
    if name not in POLICIES:
        raise PlanError(f"{name!r} is not a dispatch policy (known: {', '.join(POLICIES)})")
    return POLICIES[name]({} if demand is None else demand)
