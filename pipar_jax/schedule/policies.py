"""Dispatch policies: the order in which a host runs its ready actions, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, Action

#: A sort key; the smallest runs first.
Key = tuple[float, ...]
#: Maps an action, and the number of actions that became ready before it, to a sort key.
Policy = Callable[[Action, int], Key]


def _fcfs(demand: Mapping[int, float]) -> Policy:
    """Runs the action that became ready first."""
    del demand
    return lambda action, ready: (ready,)


def _backward_first(demand: Mapping[int, float]) -> Policy:
    """Prefers updates and backwards, which free residuals and let devices continue."""
    del demand
    urgency = {UPDATE: 0, BACKWARD: 1, LOSS: 1}
    return lambda action, ready: (urgency.get(action.kind, 2), ready)


def _slowest_first(demand: Mapping[int, float]) -> Policy:
    """Prefers the device with the longest demand (the priority of PipeSFL)."""
    # Looked up when an action becomes ready: the demand changes from round to round.
    return lambda action, ready: (-demand.get(action.device, 0.0), ready)


def _fixed(demand: Mapping[int, float]) -> Policy:
    """Runs a step's forwards in micro-batch order, then its backwards, devices in order."""
    del demand
    phase = {FORWARD: 0, LOSS: 0, BACKWARD: 1}
    return lambda action, ready: (
        action.step, phase.get(action.kind, 2), action.micro_batch, action.device, ready,
    )  # fmt: skip


#: Constructors of all policies, from each device's seconds of work per step.
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
      demand: Seconds of work per step of each device; read at each use of the policy.

    Raises:
      PlanError: There is no policy with this name.
    """
    if name not in POLICIES:
        raise PlanError(f"{name!r} is not a dispatch policy (known: {', '.join(POLICIES)})")
    return POLICIES[name]({} if demand is None else demand)
