"""Whether to change the plan: what another one would save, and the patience not to flap."""

from __future__ import annotations

from typing import NamedTuple

from pipar_jax.schedule.plan import Plan

#: Looks in a row in which another plan has to win, if it does not win by much.
LOOKS = 2
#: So many times the least gain is much: one look is enough.
MUCH = 3.0
#: Rounds under a plan before it may change again.
REST = 2
#: A plan that was the best a moment ago is kept as the choice within this share of the best.
CLOSE = 0.02


class Offer(NamedTuple):
    """A plan and what it is predicted to take.

    Attributes:
      plan: The plan.
      epoch_s: Predicted seconds of an epoch.
    """

    plan: Plan
    epoch_s: float


class Choice:
    """Follows the predictions of a run and says when to change.

    Args:
      plan: The plan at the start.
      gain: Share of its time that another plan must save.
    """

    def __init__(self, plan: Plan, gain: float) -> None:
        self.plan, self._gain = plan, gain
        self.wanted: Plan | None = None
        self._wins, self._since = 0, 0

    def give_up(self, plan: Plan) -> None:
        """Takes note that a plan cannot be had."""
        if plan == self.wanted:
            self._wins, self.wanted = 0, None

    def changed(self, index: int) -> None:
        """Takes note that the wanted plan is in force from a round on."""
        assert self.wanted is not None
        self.plan, self.wanted = self.wanted, None
        self._wins, self._since = 0, index

    def look(
        self,
        index: int,
        present: Offer,
        best: Offer,
        *,
        wanted_s: float | None,
        moving_s: float,
        epochs_left: float,
    ) -> Plan | None:
        """Takes a look's predictions; returns the plan that is wanted from now on, if any.

        Args:
          index: The round that runs.
          present: The plan in force.
          best: The best plan found.
          wanted_s: What the plan wanted at the last look would take, if one was.
          moving_s: What the change to the best costs once.
          epochs_left: Epochs after this round.
        """
        keeps = self.wanted is not None and wanted_s is not None
        if keeps and wanted_s is not None and wanted_s <= (1 + CLOSE) * best.epoch_s:
            assert self.wanted is not None
            best = Offer(self.wanted, wanted_s)
        saved_s = present.epoch_s - best.epoch_s
        pays = saved_s * epochs_left > moving_s
        if best.plan == self.plan or saved_s <= self._gain * present.epoch_s or not pays:
            self._wins, self.wanted = 0, None
            return None
        self._wins += 1
        much = saved_s > MUCH * self._gain * present.epoch_s
        # The change itself comes at the end of this round.
        rested = index + 1 - self._since >= REST or self._since == 0
        if (self._wins >= LOOKS or much) and rested:
            self.wanted = best.plan
        return self.wanted
