"""Devices that have stopped between two rounds: they send nothing, not even a heartbeat.

In a round ``cohort.deadline_s`` says how long others wait for a late device. Between rounds a live
device answers whatever the coordinator asks, however long a transfer takes; one whose process or
machine has stopped is silent, and is lost after the same time, before the link's own deadline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipar_jax.config import CohortConfig, NetworkConfig
from pipar_jax.errors import PeerError
from pipar_jax.roles.mail import Member
from pipar_jax.schedule.plan import is_device, long_name


def silent_s(cohort: CohortConfig, network: NetworkConfig) -> float:
    """Returns the seconds of silence after which a device is lost; 0 for the link's deadline.

    It is not less than half of the link's deadline: heartbeats of a busy machine are late.
    """
    if not cohort.deadline_s:
        return 0.0
    return max(cohort.deadline_s, network.deadline_s / 2)


class Silence:
    """Follows what the links of those bring who are waited for.

    Args:
      limit_s: Seconds of silence after which a device is lost; 0: none is.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._heard: dict[str, tuple[int, float]] = {}

    def over(
        self, members: Mapping[str, Member], missing: Sequence[str], now_s: float
    ) -> Iterator[tuple[str, PeerError]]:
        """Yields the devices that have been silent for too long, each with the reason.

        Args:
          members: The present members by name.
          missing: Those that are waited for.
          now_s: The time, on the monotonic clock.
        """
        for name in missing if self._limit_s else ():
            if name not in members or not is_device(name):
                continue
            nbytes = members[name].link.stats().bytes_in
            before, since_s = self._heard.get(name, (-1, now_s))
            if nbytes != before:
                self._heard[name] = nbytes, now_s
            elif now_s - since_s >= self._limit_s:
                yield (
                    name,
                    PeerError(
                        f"{long_name(name)} has been silent for {now_s - since_s:.1f} s between "
                        "rounds (cohort.deadline_s)"
                    ),
                )
