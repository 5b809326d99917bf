"""Undoing training on a host when a device or compute node is lost.

With a copy of the weights per device, a round in which a device is lost leaves nothing of it
but an optimiser state, which goes back to the round's start; its weights are replaced by the next
average. In sequential order a turn is undone. Where gradients are summed, the step in which a
device fails is recomputed by the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from pipar_jax.config import CohortConfig, Hosts, keeps_state
from pipar_jax.schedule.actions import ALL
from pipar_jax.schedule.keep import Keep, keep
from pipar_jax.schedule.plan import Order, Plan
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.training.replica import Replica

Replicas = Mapping[tuple[int, int], Replica]


def find_keep(hosts: Hosts, cohort: CohortConfig, plan: Plan, copy: int) -> Keep:
    """Returns what a replica must keep of an earlier state.

    Args:
      hosts: The hosts of the run, some of which may be lost.
      cohort: How the state of a dropped device is treated.
      plan: The plan.
      copy: The replica's owner: a place, or ``ALL`` for a replica that devices share.
    """
    if not (hosts.may_lose or hosts.may_lose_nodes):
        return Keep.NOTHING
    return keep(plan, copy, keeps_state=keeps_state(cohort))


def begin_round(replicas: Replicas, schedule: RoundSchedule, index: int, *, anew: bool) -> None:
    """Records the state at the start of a round, or of its rest after a rewind.

    Args:
      replicas: The host's replicas.
      schedule: The round.
      index: The round's number in the run.
      anew: Whether it is the round's start.
    """
    plan = schedule.plan
    if plan.order == Order.PARALLEL:
        # Of spans without a step as well: another device may be lost when all steps are over.
        firsts = {span.device: span.first for span in schedule.spans}
        whole = min(firsts.values(), default=0)
        for (copy, _), replica in replicas.items():
            first = whole if copy == ALL else firsts.get(copy, 0)
            course = first if plan.sums_gradients else index * schedule.steps_of_round(copy)
            replica.begin_round(first, course=course, anew=anew)


def begin_turn(replicas: Replicas) -> None:
    """Keeps the state that devices share at the start of a turn, in sequential order."""
    for (copy, _), replica in replicas.items():
        if copy == ALL:
            replica.begin_turn()


def undo_turn(replicas: Replicas) -> None:
    """Undoes the last turn."""
    for (copy, _), replica in replicas.items():
        if copy == ALL:
            replica.undo_turn()


class Reach(NamedTuple):
    """The steps of a round to which a host can go back.

    Attributes:
      least: The earliest one.
      step: The last one: the first step of which some update is missing.
    """

    least: int
    step: int


def reach(replicas: Replicas, schedule: RoundSchedule, without: Collection[int]) -> Reach:
    """Returns to which steps a host can go back.

    Args:
      replicas: The host's replicas.
      schedule: The round under way.
      without: Lost places, whose own weights do not count.
    """
    over = max((span.stop for span in schedule.spans), default=0)
    some = [one for (copy, _), one in replicas.items() if copy in _taking(schedule) - set(without)]
    step = min((one.step for one in some), default=over)
    return Reach(min(step, max((one.least_step for one in some), default=0)), step)


def rewind(
    replicas: Replicas, schedule: RoundSchedule, without: Collection[int], step: int
) -> None:
    """Restores the state at the end of the step before ``step``.

    Raises:
      RunError: A copy keeps nothing of it any more.
    """
    for (copy, _), replica in replicas.items():
        lost = copy in without and not replica.least_step <= step <= replica.step
        if copy in _taking(schedule) and not lost:
            replica.rewind(step)


def _taking(schedule: RoundSchedule) -> set[int]:
    """Returns the copies that a round trains."""
    return {ALL} | {span.device for span in schedule.spans if span.stop > span.first}


def leave_out(replicas: Replicas, schedule: RoundSchedule, places: Collection[int]) -> None:
    """Undoes the training of places that do not count in a round.

    Args:
      replicas: The host's replicas.
      schedule: The round that is over.
      places: The places that count.
    """
    if schedule.plan.order == Order.PARALLEL:
        for (copy, _), replica in replicas.items():
            if copy != ALL and copy not in places:
                replica.undo_round()


def end_round(replicas: Replicas) -> None:
    """Discards what was kept of a completed round."""
    for replica in replicas.values():
        replica.end_round()
