"""The devices that have registered for a run, present or not.

An absent device costs a few numbers: memory for weights, links and messages is only held for
present devices and for the places of a round's cohort.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipar_jax.disk.json_text import JsonObject
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.selection import Candidate
from pipar_jax.schedule.plan import device_name, host_index

#: What of a device a checkpoint holds.
_KEPT = ("index", "samples", "steps", "fresh", "rounds", "last", "step", "losses")


class Presence(enum.Enum):
    """Whether a registered device is present, and why not."""

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
      presence: Whether it is present.
      ready: Whether it has prepared its share of the plan, and so may take part in a round.
      current: Whether it has the current weights.
      fresh: Whether it begins its next round without an optimiser state from earlier rounds.
      rounds: Number of counted rounds that it took part in.
      last: How many rounds of the run were over with the last of them.
      step: The next step in its own data; rounds that do not count leave it unchanged.
      since_s: When it joined or left, on the monotonic clock.
      losses: Number of times that it was lost.
      returns: Number of times that it came back.
    """

    index: int
    samples: int
    steps: int
    presence: Presence = Presence.PRESENT
    ready: bool = False
    current: bool = False
    fresh: bool = True
    rounds: int = 0
    last: int = 0
    step: int = 0
    since_s: float = 0.0
    losses: int = 0
    returns: int = 0

    @property
    def present(self) -> bool:
        """Whether it is present."""
        return self.presence is Presence.PRESENT


class Population:
    """All registered devices, by index."""

    def __init__(self) -> None:
        """Begins empty."""
        self._by_index: dict[int, Registered] = {}

    def __contains__(self, index: int) -> bool:
        """Returns whether a device has ever joined."""
        return index in self._by_index

    def __getitem__(self, index: int) -> Registered:
        """Returns a device that has joined."""
        return self._by_index[index]

    def __iter__(self) -> Iterator[Registered]:
        """Yields all devices that have ever joined, in the order of their indices."""
        return iter([self._by_index[index] for index in sorted(self._by_index)])

    def __len__(self) -> int:
        """Returns the number of devices that have ever joined."""
        return len(self._by_index)

    def join(self, who: Identity, now_s: float) -> float | None:
        """Records that a device is present.

        Args:
          who: Its reported identity. Samples and steps may have changed while it was absent.
          now_s: The time, on the monotonic clock.

        Returns:
          The seconds for which it was absent; None if it joins for the first time.
        """
        one = self._by_index.get(who.index)
        if one is None:
            self._by_index[who.index] = Registered(who.index, who.samples, who.steps, since_s=now_s)
            return None
        away_s = now_s - one.since_s
        one.samples, one.steps = who.samples, who.steps
        one.presence, one.since_s = Presence.PRESENT, now_s
        one.returns += 1
        return away_s

    def go(self, index: int, presence: Presence, now_s: float) -> None:
        """Records that a device is gone."""
        one = self._by_index[index]
        one.presence, one.ready, one.since_s = presence, False, now_s
        one.current, one.fresh = False, True
        one.losses += presence is Presence.LOST

    def records(self) -> list[JsonObject]:
        """Returns what a checkpoint holds of all that have ever joined."""
        return [
            {key: getattr(one, key) for key in _KEPT} | {"present": one.present} for one in self
        ]

    def recall(self, records: Sequence[Mapping[str, Any]], now_s: float) -> None:
        """Takes up what a checkpoint holds; who has not joined again yet counts as lost.

        Args:
          records: What ``records`` returned.
          now_s: The time, on the monotonic clock.
        """
        for row in records:
            row = {"last": row["rounds"], **row}  # a checkpoint may be of before it was noted
            one = self._by_index.get(row["index"])
            if one is None:
                known = {key: row[key] for key in _KEPT}
                self._by_index[row["index"]] = Registered(
                    **{**known, "fresh": True}, presence=Presence.LOST, since_s=now_s
                )
                continue
            one.rounds, one.last, one.step = row["rounds"], row["last"], row["step"]
            one.fresh, one.losses = row["fresh"], row["losses"]

    def is_ready(self, name: str) -> bool:
        """Returns whether a device can begin a round; one that has just come back cannot."""
        index = host_index(name)
        return index in self and self[index].ready

    def ready(self) -> list[Candidate]:
        """Returns the devices that are allowed to take part in a round."""
        return [Candidate(one.index, one.samples, one.rounds) for one in self if one.ready]

    def present(self) -> list[str]:
        """Returns the names of the present devices."""
        return [device_name(one.index) for one in self if one.present]
