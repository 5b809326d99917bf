"""What a copy of a stage's weights keeps of an earlier moment, to go back to it after a loss."""

from __future__ import annotations

import enum

from pipar_jax.schedule.actions import ALL
from pipar_jax.schedule.plan import Plan


class Keep(enum.Flag):
    """What a copy keeps."""

    NOTHING = 0
    #: The optimiser state of the round's start.
    OPTIMIZER = enum.auto()
    #: All of it, of the start of a device's turn.
    TURN = enum.auto()
    #: All of it, before the last step.
    STEP = enum.auto()


def keep(plan: Plan, copy: int, *, keeps_state: bool) -> Keep:
    """Returns what a copy has to keep in a run in which devices may be lost.

    Args:
      plan: The plan.
      copy: A place, or ``ALL`` for the copy that devices share.
      keeps_state: Whether a dropped device goes back to the optimiser state of the round's start.
    """
    if plan.order == "sequential":
        return Keep.TURN if copy == ALL else Keep.NOTHING
    kept = Keep.OPTIMIZER if keeps_state and copy != ALL else Keep.NOTHING
    return kept | Keep.STEP if plan.sums_gradients else kept
