"""A profile that follows what a run shows of its hosts' speed and its links' rates.

A host's times are those of the profile, all times one factor: what its computations lasted, by
what the profile says of the very same ones. A link's rate is bytes by the seconds that they took,
of frames that followed one another without a gap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pipar_jax.plan import COORDINATOR, Plan, device_name
from pipar_jax.profile import Profile
from pipar_jax.simulator.costs import LinkModel
from pipar_jax.tuner.predict import HostTimes

#: What a rate is told by at least: less is noise of timers.
LEAST_BYTES, LEAST_S = 48 << 10, 0.05
#: A change by less than this factor is taken for noise and averaged; a larger one is believed.
NOISE = 1.25


class Computed(Protocol):
    """One kind of computation, as often as it was seen; ``runtime.observer.Seen`` is one."""

    @property
    def device(self) -> int:
        """Whose data."""

    @property
    def stage(self) -> int:
        """Which stage of the plan."""

    @property
    def kind(self) -> str:
        """F, B, L or U."""

    @property
    def samples(self) -> int:
        """Samples in its micro-batch."""

    @property
    def times(self) -> int:
        """How often."""

    @property
    def median_s(self) -> float:
        """How long."""


class Carried(NamedTuple):
    """What a direction of a link has carried without a gap, since the link began.

    Attributes:
      nbytes: Bytes.
      seconds: What they took.
    """

    nbytes: float = 0.0
    seconds: float = 0.0


class Watch:
    """Follows a profile's hosts and links.

    Args:
      profile: How they were at the beginning.
    """

    def __init__(self, profile: Profile) -> None:
        """See the class."""
        self._base = profile
        devices = range(len(profile.devices))
        self._times = {device_name(d): HostTimes(profile.devices[d].host) for d in devices}
        self._times[COORDINATOR] = HostTimes(profile.server)
        self._factors = dict.fromkeys(self._times, 1.0)
        self._rates = {(d, up): _link(profile, d, up).rate_bytes_s
                       for d in devices for up in (True, False)}  # fmt: skip
        self._carried: dict[tuple[int, bool], Carried] = {}

    def computed(self, host: str, plan: Plan, seen: Sequence[Computed]) -> None:
        """Takes what a host's computations lasted.

        Args:
          host: Its name.
          plan: The plan that they belong to.
          seen: The computations.
        """
        actual_s = expected_s = 0.0
        for one in seen:
            units = plan.units(one.device, one.stage, len(self._base.units))
            alone_s = self._times[host].time_s(one.kind, units.start, units.stop, one.samples)
            actual_s += one.times * one.median_s
            expected_s += one.times * alone_s
        if actual_s > 0 and expected_s > 0:
            self._factors[host] = _follow(self._factors[host], actual_s / expected_s)

    def carried(self, device: int, up: bool, total: Carried) -> None:
        """Takes what a direction of a link has carried so far.

        Args:
          device: Whose link.
          up: Whether to the server.
          total: Since the link began.
        """
        before = self._carried.setdefault((device, up), total)
        nbytes, seconds = total.nbytes - before.nbytes, total.seconds - before.seconds
        if nbytes >= LEAST_BYTES and seconds >= LEAST_S:
            self._carried[device, up] = total
            rate = self._rates[device, up]
            self._rates[device, up] = _follow(rate or nbytes / seconds, nbytes / seconds)

    def profile(self) -> Profile:
        """Returns the profile as hosts and links are now."""
        devices = []
        for index, one in enumerate(self._base.devices):
            up, down = (
                dataclasses.replace(link, rate_bytes_s=self._rates[index, way])
                for link, way in ((one.up, True), (one.down, False))
            )
            host = one.host.slowed(self._factors[device_name(index)])
            devices.append(dataclasses.replace(one, host=host, up=up, down=down))
        server = self._base.server.slowed(self._factors[COORDINATOR])
        return dataclasses.replace(self._base, server=server, devices=tuple(devices))

    def state(self) -> tuple[float, ...]:
        """Returns all factors and rates, to tell whether much has changed."""
        return (*self._factors.values(), *(rate or 0.0 for rate in self._rates.values()))


def differ(one: Sequence[float], other: Sequence[float], share: float) -> bool:
    """Says whether two states of a watch differ by more than a share anywhere."""
    return any(abs(a - b) > share * max(a, b) for a, b in zip(one, other, strict=True))


def _link(profile: Profile, device: int, up: bool) -> LinkModel:
    return profile.devices[device].up if up else profile.devices[device].down


def _follow(old: float, new: float) -> float:
    """Averages a small change and believes a large one."""
    return (old + new) / 2 if max(old, new) <= NOISE * min(old, new) else new
