"""The decision to change the plan during a run, with hysteresis."""

from __future__ import annotations

from typing import NamedTuple

from pipar_jax.schedule.plan import Plan

#: Number of consecutive checks that another plan has to win, unless it wins by a large margin.
LOOKS = 2
#: Multiple of the minimum gain for which one check is enough.
MUCH = 3.0
#: Minimum number of rounds between two changes of the plan.
REST = 2
#: The previous choice is kept if it is within this share of the best plan.
CLOSE = 0.02


class Offer(NamedTuple):
    """A plan and its predicted epoch.

    Attributes:
      plan: The plan.
      epoch_s: Predicted seconds of an epoch.
    """

    plan: Plan
    epoch_s: float


class Choice:
    """Tracks the predictions of a run and decides on changes of the plan.

    Args:
      plan: The plan at the start.
      gain: Share of its time that another plan must save.
    """

    def __init__(self, plan: Plan, gain: float) -> None:
        self.plan, self._gain = plan, gain
        self.wanted: Plan | None = None
        self._wins, self._since = 0, 0

    def give_up(self, plan: Plan) -> None:
        """Excludes a plan that turned out to be impossible."""
        if plan == self.wanted:
            self._wins, self.wanted = 0, None

    def changed(self, index: int) -> None:
        """Records that the chosen plan is in force from a round on."""
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
        """Adds the predictions of a check; returns the plan to change to, if any.

        Args:
          index: The current round.
          present: The current plan.
          best: The best plan.
          wanted_s: Predicted seconds of the plan chosen at the last check, if any.
          moving_s: Seconds of the change to the best plan.
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
        # The plan changes at the end of this round.
        rested = index + 1 - self._since >= REST or self._since == 0
        if (self._wins >= LOOKS or much) and rested:
            self.wanted = best.plan
        return self.wanted
