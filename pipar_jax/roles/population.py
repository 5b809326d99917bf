"""The devices that have registered for a run, whether they are there or not.

What is kept of a device that is away is a few numbers: memory for weights, links and messages
belongs to those that are there, and to the places of a round's cohort.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator

from pipar_jax.roles.admission import Identity
from pipar_jax.roles.selection import Candidate
from pipar_jax.schedule.plan import device_name


class Presence(enum.Enum):
    """Where a registered device is."""

    PRESENT = "present"
    LOST = "lost"
    LEFT = "left"


@dataclasses.dataclass(slots=True)
class Registered:
    """A device that has joined at least once.

    Attributes:
      index: Its index.
      samples: Samples that it trains on in an epoch.
      steps: Steps in its epoch.
      presence: Where it is.
      ready: Whether it has prepared its share of the plan, and so may take part in a round.
      current: Whether it has the weights of the moment.
      fresh: Whether it begins its next round without an optimiser state of rounds before.
      rounds: Rounds that it took part in and that count.
      step: The step that comes next in its own data; rounds that do not count leave it as it is.
      since_s: When it came or went, on the monotonic clock.
      losses: How often it was lost.
    """

    index: int
    samples: int
    steps: int
    presence: Presence = Presence.PRESENT
    ready: bool = False
    current: bool = False
    fresh: bool = True
    rounds: int = 0
    step: int = 0
    since_s: float = 0.0
    losses: int = 0


class Population:
    """All registered devices, by index."""

    def __init__(self) -> None:
        """Begins with none."""
        self._by_index: dict[int, Registered] = {}

    def __contains__(self, index: int) -> bool:
        """Returns whether a device has ever joined."""
        return index in self._by_index

    def __getitem__(self, index: int) -> Registered:
        """Returns a device that has joined."""
        return self._by_index[index]

    def __iter__(self) -> Iterator[Registered]:
        """Yields all that have ever joined, in the order of their indices."""
        return iter([self._by_index[index] for index in sorted(self._by_index)])

    def __len__(self) -> int:
        """Returns how many have ever joined."""
        return len(self._by_index)

    def join(self, who: Identity, now_s: float) -> float | None:
        """Notes that a device is there.

        Args:
          who: What it says of itself. Samples and steps may have changed while it was away.
          now_s: The time, on the monotonic clock.

        Returns:
          The seconds that it was away; None if it has never been there.
        """
        one = self._by_index.get(who.index)
        if one is None:
            self._by_index[who.index] = Registered(who.index, who.samples, who.steps, since_s=now_s)
            return None
        away_s = now_s - one.since_s
        one.samples, one.steps = who.samples, who.steps
        one.presence, one.since_s = Presence.PRESENT, now_s
        return away_s

    def go(self, index: int, presence: Presence, now_s: float) -> None:
        """Notes that a device is gone."""
        one = self._by_index[index]
        one.presence, one.ready, one.since_s = presence, False, now_s
        one.current, one.fresh = False, True
        one.losses += presence is Presence.LOST

    def ready(self) -> list[Candidate]:
        """Returns the devices that may take part in a round."""
        return [Candidate(one.index, one.samples, one.rounds) for one in self if one.ready]

    def present(self) -> list[str]:
        """Returns the names of the devices that are there."""
        return [device_name(one.index) for one in self if one.presence is Presence.PRESENT]
