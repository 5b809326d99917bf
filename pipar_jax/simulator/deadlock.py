"""Explains why a schedule deadlocks: the offending action, its predecessors, and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipar_jax.errors import ScheduleError
from pipar_jax.schedule.actions import (
    BACKWARD,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    RECEIVE_CLIENT_MODEL,
    RECEIVE_FORWARD,
    RECEIVES,
    Action,
)
from pipar_jax.schedule.dispatch import Demand
from pipar_jax.schedule.plan import Plan
from pipar_jax.simulator.network import Direction
from pipar_jax.simulator.state import SimulatedHost


def describe(plan: Plan, hosts: Sequence[SimulatedHost], actions: int) -> ScheduleError:
    """Returns the error that names the offending action and prints the grid.

    Args:
      plan: The plan.
      hosts: All hosts, with their last and their waiting actions.
      actions: Number of performed actions.
    """
    blocked: dict[Action, list[Action]] = {}
    where: dict[Action, str] = {}
    demands: dict[Action, Demand | None] = {}
    for host in hosts:
        for action, before in host.dispatcher.blocked().items():
            blocked[action] = before
            where[action] = host.name
            demands[action] = host.dispatcher.demand(action)
    cell, reason = _offender(plan, blocked, demands)
    place = where.get(cell, "nowhere")
    return ScheduleError(
        f"the schedule deadlocks after {actions} actions: {place} cannot run {cell}, because "
        f"{reason}\n{grid(hosts, blocked, where, cell)}"
    )


def grid(
    hosts: Sequence[SimulatedHost],
    blocked: Mapping[Action, list[Action]],
    where: Mapping[Action, str],
    cell: Action,
) -> str:
    """Returns one line per host: its last actions, then its blocked ones, the offender marked.

    Args:
      hosts: All hosts.
      blocked: The blocked actions.
      where: Host of the offending action.
      cell: The offending action.
    """
    shown = [host for host in hosts if host.last or host.name in where.values()]
    width = max((len(host.name) for host in shown), default=0)
    lines = []
    for host in shown[:16]:
        stuck = [action for action in blocked if where[action] == host.name]
        stuck.sort(key=lambda action: (action != cell, action.step, action.micro_batch))
        done = " ".join(map(str, host.last)) or "nothing"
        cells = [f">>{action}<<" if action == cell else str(action) for action in stuck[:4]]
        more = f" and {len(stuck) - 4} more" if len(stuck) > 4 else ""
        lines.append(f"  {host.name:<{width}} | {done} | {' '.join(cells) or 'done'}{more}")
    if len(shown) > 16:
        lines.append(f"  … and {len(shown) - 16} more hosts")
    return "\n".join(["  host | last actions | cannot run", *lines])


def _offender(
    plan: Plan, blocked: Mapping[Action, list[Action]], demands: Mapping[Action, Demand | None]
) -> tuple[Action, str]:
    """Follows predecessors to a cycle, a full link or an action that no host performs."""
    for action, before in blocked.items():
        if not before:
            return action, _no_credit(demands[action])
    current = next(iter(blocked))
    path: list[Action] = []
    while current not in path:
        path.append(current)
        waits_for = next(
            (other for other in blocked[current] if other not in path), blocked[current][0]
        )
        source = _source(plan, waits_for) if waits_for.kind in RECEIVES else waits_for
        if source not in blocked:
            return current, f"it waits for {waits_for}, which no host performs"
        current = source
    circle = " waits for ".join(map(str, [*path[path.index(current) :], current]))
    return current, f"it waits for itself: {circle}"


def _no_credit(demand: Demand | None) -> str:
    """Returns the link without credit for a ready action's result, or that its stage is full."""
    link = None if demand is None else demand.link
    if demand is None or link is None or link.can_send(demand.nbytes):
        return "too many micro-batches are between forward and backward on its stage"
    assert isinstance(link.link, Direction)
    return (
        f"the link {link.link} has no credit for {demand.nbytes:.0f} bytes: "
        f"{link.link.outstanding + link.reserved_bytes:.0f} bytes were sent and not yet consumed "
        "by the receiver; widen the window"
    )


def _source(plan: Plan, receive: Action) -> Action:
    """Returns the computation whose result a receive waits for, as named on its host."""
    if receive.kind == RECEIVE_FORWARD:
        return receive._replace(stage=receive.stage - 1, kind=FORWARD)
    if receive.kind == RECEIVE_BACKWARD:
        above = receive.stage + 1
        last = above == plan.devices[receive.device].stages - 1
        return receive._replace(stage=above, kind=LOSS if last else BACKWARD)
    assert receive.kind in (RECEIVE_CLIENT_MODEL, *RECEIVES)
    return receive
