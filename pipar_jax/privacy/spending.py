"""How often a device's records were released: pure arithmetic, the same on every host."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple


class Entry(NamedTuple):
    """What is about to leave a device.

    Attributes:
      group: Records are in no more than one step of a group: the shuffle and its epoch. Updates of
        a whole user are all in one group and in one step.
      step: The step within the group.
      cost: What the releases add to ``spent`` of the step's records.
    """

    group: str
    step: int
    cost: float


class Spending:
    """Sums the costs of releases for the record that has been released most.

    A record is in one step of each epoch, in which one only the device knows. So the bound is the
    sum over groups of the most expensive step of each; it does not depend on the data.
    """

    def __init__(self) -> None:
        self._steps: dict[str, dict[int, float]] = {}
        self._labels: dict[str, float] = {}

    def add(self, entry: Entry) -> None:
        """Counts an entry; one that is repeated counts again."""
        steps = self._steps.setdefault(entry.group, {})
        steps[entry.step] = steps.get(entry.step, 0.0) + entry.cost

    def add_labels(self, response: str, epsilon: float) -> None:
        """Counts a randomised response; the same response again costs nothing.

        Args:
          response: What tells its draws from others.
          epsilon: Its epsilon.
        """
        self._labels[response] = epsilon

    def labels_after(self, response: str, epsilon: float) -> float:
        """Returns what ``label_epsilon`` would be after a further randomised response."""
        return sum({**self._labels, response: epsilon}.values())

    def spent_after(self, entry: Entry) -> float:
        """Returns what would be spent after a further entry."""
        steps = self._steps.get(entry.group, {})
        before = max(steps.values(), default=0.0)
        return self.spent - before + max(before, steps.get(entry.step, 0.0) + entry.cost)

    def after(self, entries: Iterable[Entry]) -> Spending:
        """Returns what would be spent after further entries."""
        made = copy.deepcopy(self)
        for entry in entries:
            made.add(entry)
        return made

    @property
    def spent(self) -> float:
        """mu**2 of the Gaussian releases of a record, at most."""
        return sum(max(steps.values()) for steps in self._steps.values())

    @property
    def label_epsilon(self) -> float:
        """The epsilon of randomised labels: pure, so it adds to that of the rest."""
        return sum(self._labels.values())
