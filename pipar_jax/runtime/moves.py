"""Which plans may follow a plan, and which copies of units then move to which host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipar_jax.cost_model.profile import Profile
from pipar_jax.errors import PlanError
from pipar_jax.schedule.feasibility import check_adaptable
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.plan import COORDINATOR, Plan, is_node


class Move(NamedTuple):
    """A copy of a unit that changes its host.

    Attributes:
      copy: The owner of the copy: a device's number, or ALL for a copy that devices share.
      unit: The unit's index.
      source: The host that holds it under the old plan.
      target: The host that holds it under the new one.
    """

    copy: int
    unit: int
    source: str
    target: str


def check_follows(old: Plan, new: Plan, units: int) -> None:
    """Checks that a plan can follow another during a run.

    Raises:
      PlanError: A plan cannot change at all, or the change would alter what is trained.
    """
    check_adaptable(old)
    check_adaptable(new)
    if (reason := why_not_follow(old, new, units)) is not None:
        raise PlanError(f"the plan {old} cannot be changed to {new} during a run: {reason}")


def why_not_follow(old: Plan, new: Plan, units: int) -> str | None:
    """Returns why one plan cannot follow another without changing what is trained, or None.

    Args:
      old: The plan so far.
      new: The plan from now on.
      units: How many units the model has.
    """
    for field in ("order", "weights", "aggregate_every"):
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            shown = [str(one) if isinstance(one, str) else one for one in (before, after)]
            return f"{field} would change from {shown[0]!r} to {shown[1]!r}"
    differing = holders(old, units).keys() ^ holders(new, units).keys()
    if differing:
        found = ", ".join(str(unit) for unit in sorted({unit for _, unit in differing}))
        return (
            f"units {found} would no longer be each device's own, or shared: with shared weights "
            "units move between compute nodes alone"
        )
    return None


def moves(old: Plan, new: Plan, units: int) -> list[Move]:
    """Returns the copies of units that move when one plan follows another.

    Args:
      old: The plan so far.
      new: The plan from now on, to which ``why_not_follow`` has none.
      units: How many units the model has.
    """
    targets = holders(new, units)
    return [
        Move(copy, unit, source, targets[copy, unit])
        for (copy, unit), source in holders(old, units).items()
        if source != targets[copy, unit]
    ]


def local_to(host: str, plan: Plan, *, besides: Plan, units: int) -> list[int]:
    """Returns the units that live together on a host under a plan, but not under another.

    Args:
      host: The host's name.
      plan: The plan.
      besides: The other plan.
      units: How many units the model has.
    """
    others = besides.local_units(host, units)
    return [unit for unit in plan.local_units(host, units) if unit not in others]


def moving_s(profile: Profile, some: Sequence[Move]) -> float:
    """Returns an estimate of the seconds to move units: all hosts send, then all receive."""
    given: dict[str, float] = {}
    gained: dict[str, float] = {}
    carried: set[tuple[str, int]] = set()
    for one in some:
        facts = profile.units[one.unit]
        weights = facts.parameter_bytes + facts.state_bytes
        for host, total, whole in (
            (one.source, given, is_node(one.source)),
            (one.target, gained, True),
        ):
            nbytes = facts.optimizer_bytes
            if whole and (host, one.unit) not in carried:  # once for all copies
                carried.add((host, one.unit))
                nbytes += weights
            total[host] = total.get(host, 0.0) + nbytes
    ways = ((given, True), (gained, False))
    return sum(
        max((_line_s(profile, host, up, n) for host, n in total.items()), default=0.0)
        for total, up in ways
    )


def holders(plan: Plan, units: int) -> dict[tuple[int, int], str]:
    """Returns the host of each copy of each unit, by (copy, unit)."""
    return {
        (replica_key(plan, device, stage)[0], unit): plan.host(device, stage)
        for device, one in enumerate(plan.devices)
        for stage in range(one.stages)
        for unit in plan.units(device, stage, units)
    }


def _line_s(profile: Profile, host: str, up: bool, nbytes: float) -> float:
    """Returns an estimate of the seconds of a transfer between a host and the coordinator."""
    if host == COORDINATOR:
        return 0.0
    one = profile.of(host)
    return (one.up if up else one.down).occupied_s(nbytes)
