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
    #: All of it, before the step before the last one as well.
    STEP_BEFORE = enum.auto()

    @property
    def wholes(self) -> int:
        """How many earlier moments it keeps with all that belongs to them."""
        return sum(one in self for one in (Keep.TURN, Keep.STEP, Keep.STEP_BEFORE))


def keep(plan: Plan, copy: int, *, keeps_state: bool) -> Keep:
    """Returns what a copy has to keep in a run in which devices may be lost.

    Where gradients are summed, an update of a shared copy needs the part of every device in its
    step, and so the update before of every other copy. A device's own copy needs the part of its
    own device alone: it may be a step ahead of the shared copies, while that of a slower device is
    a step behind them. All of them have to come back to the same step.

    Args:
      plan: The plan.
      copy: A place, or ``ALL`` for the copy that devices share.
      keeps_state: Whether a dropped device goes back to the optimiser state of the round's start.
    """
    if plan.order == "sequential":
        return Keep.TURN if copy == ALL else Keep.NOTHING
    kept = Keep.OPTIMIZER if keeps_state and copy != ALL else Keep.NOTHING
    if not plan.sums_gradients:
        return kept
    return kept | (Keep.STEP if copy == ALL else Keep.STEP | Keep.STEP_BEFORE)
