"""A profile that follows what a run shows of its hosts' speed and its links' rates.

A host's times are those of the profile, all times one factor: what its computations lasted, by what
the profile says of the very same ones. A host whose times were predicted has a learner instead,
which is fed by what its stages lasted; the factor is that of its optimiser steps. What threads and
messages add to each computation in a run says nothing of the others, and is left out. A line's rate
is bytes by the seconds that they took, of frames that followed one another without a gap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import HostProfile, Profile
from pipar_jax.schedule.actions import ALL, UPDATE
from pipar_jax.schedule.plan import COORDINATOR, Boundary, Plan, device_name, is_node, node_name
from pipar_jax.simulator.predict import HostTimes

#: What a rate is told by at least: less is noise of timers.
LEAST_BYTES, LEAST_S = 48 << 10, 0.05
#: A change by less than this factor is taken for noise and averaged; a larger one is believed.
NOISE = 1.25
#: What a computation may last longer in a run than alone, whatever its size: threads wake up and
#: messages are handled meanwhile. Measured on a core that trained: 0.4 to 1.2 ms.
OVERHEAD_S = 0.0015
#: How many times slower or faster a host may become: beyond it what it tells is no measurement, and
#: products of such numbers leave the range of floats.
MOST_FACTOR = 1e6
#: Runs of units whose times tell whether much was learned of a host.
PARTS = 4


class Computed(Protocol):
    """One kind of computation, as often as it was seen; ``runtime.observer.Seen`` is one."""

    @property
    def device(self) -> int:
        """Whose data; ALL for an update that serves all devices."""

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


class Learns(Protocol):
    """What is known of a host and becomes more; ``predictor.online.Learner`` is one."""

    def predict_s(self, case: tuple[str, int, int, int]) -> float:
        """Returns how long a stage is believed to take; see ``observe``."""

    def observe(self, case: tuple[str, int, int, int], seconds: float) -> None:
        """Notes how long a stage took: F, B or L, first unit, one past the last, samples."""

    def learn(self) -> object:
        """Makes use of what was noted."""

    def profile(self, sizes: Sequence[int]) -> HostProfile:
        """Returns the times of all units at some micro-batch sizes."""


class LinkThroughput(NamedTuple):
    """What a direction of a link has carried without a gap, since the link began.

    Attributes:
      nbytes: Bytes.
      seconds: What they took.
    """

    nbytes: float = 0.0
    seconds: float = 0.0


class ProfileTracker:
    """Follows a profile's hosts and links.

    Args:
      profile: How they were at the beginning.
      learners: Of hosts whose times were predicted, what learns them.
    """

    def __init__(self, profile: Profile, learners: Mapping[str, Learns] | None = None) -> None:
        self._base = profile
        self._learners = learners or {}
        self._hosts = {COORDINATOR: profile.server}
        lines: list[tuple[str, LinkModel, LinkModel]] = []
        for index, device in enumerate(profile.devices):
            self._hosts[device_name(index)] = device.host
            lines.append((device_name(index), device.up, device.down))
        for index, node in enumerate(profile.nodes):
            self._hosts[node_name(index + 1)] = node.host
            lines.append((node_name(index + 1), node.up, node.down))
        self._times = {name: HostTimes(host) for name, host in self._hosts.items()}
        self._factors = dict.fromkeys(self._hosts, 1.0)
        self._learned: dict[str, HostProfile] = {}
        self._rates = {(name, way): link.rate_bytes_s
                       for name, up, down in lines
                       for way, link in ((True, up), (False, down))}  # fmt: skip
        self._carried: dict[tuple[Boundary, str], LinkThroughput] = {}

    def computed(self, host: str, plan: Plan, seen: Sequence[Computed]) -> None:
        """Takes what a host's computations lasted.

        Args:
          host: Its name.
          plan: The plan that they belong to.
          seen: The computations.
        """
        learner = self._learners.get(host)
        actual_s = expected_s = 0.0
        learned = False
        for one in seen:
            units = self._units(plan, one)
            if learner is not None and one.kind != UPDATE:
                case = one.kind, units.start, units.stop, one.samples
                learner.observe(case, _without_overhead(one.median_s, learner.predict_s(case)))
                learned = True
                continue
            alone_s = self._times[host].time_s(one.kind, units.start, units.stop, one.samples)
            believed_s = self._factors[host] * alone_s
            actual_s += one.times * _without_overhead(one.median_s, believed_s)
            expected_s += one.times * alone_s
        if actual_s > 0 and expected_s > 0:
            factor = min(max(actual_s / expected_s, 1 / MOST_FACTOR), MOST_FACTOR)
            self._factors[host] = _follow(self._factors[host], factor)
        if learner is not None and learned:
            learner.learn()
            self._learned[host] = learner.profile(self._hosts[host].sizes)

    def _units(self, plan: Plan, one: Computed) -> range:
        """Returns the units of a computation's stage."""
        device = 0 if one.device == ALL else one.device
        return plan.units(device, one.stage, len(self._base.units))

    def carried(self, boundary: Boundary, target: str, total: LinkThroughput) -> None:
        """Takes what a link has carried to one of its ends so far.

        A device's links are one line, its own; that between two nodes is the one above the lower.

        Args:
          boundary: Where the link is.
          target: The end that it was carried to.
          total: Since the link began.
        """
        before = self._carried.setdefault((boundary, target), total)
        nbytes, seconds = total.nbytes - before.nbytes, total.seconds - before.seconds
        if nbytes < LEAST_BYTES or seconds < LEAST_S:
            return
        self._carried[boundary, target] = total
        devices = [one for one in boundary[:2] if one != COORDINATOR and not is_node(one)]
        line = (devices or [boundary.lower])[0]
        way = line, (target != line)
        self._rates[way] = _follow(self._rates[way] or nbytes / seconds, nbytes / seconds)

    def profile(self) -> Profile:
        """Returns the profile as hosts and links are now."""
        return dataclasses.replace(
            self._base,
            server=self._host(COORDINATOR),
            devices=tuple(
                dataclasses.replace(
                    one,
                    host=self._host(device_name(index)),
                    up=self._line(one.up, device_name(index), True),
                    down=self._line(one.down, device_name(index), False),
                )
                for index, one in enumerate(self._base.devices)
            ),
            nodes=tuple(
                dataclasses.replace(
                    one,
                    host=self._host(node_name(index + 1)),
                    up=self._line(one.up, node_name(index + 1), True),
                    down=self._line(one.down, node_name(index + 1), False),
                )
                for index, one in enumerate(self._base.nodes)
            ),
        )

    def _host(self, name: str) -> HostProfile:
        """Returns a host's profile as it is now."""
        slowed = self._hosts[name].slowed(self._factors[name])
        if name not in self._learners:
            return slowed
        return dataclasses.replace(
            self._learned.get(name, self._hosts[name]),
            update_s=slowed.update_s,
            memory_bytes=slowed.memory_bytes,
        )

    def _line(self, link: LinkModel, name: str, up: bool) -> LinkModel:
        """Returns a direction of a host's line as it is now."""
        return dataclasses.replace(link, rate_bytes_s=self._rates[name, up])

    def state(self) -> tuple[float, ...]:
        """Returns all factors, rates and times learned, to tell whether much has changed."""
        learned = (seconds for name in self._learners for seconds in _parts(self._host(name)))
        rates = (rate or 0.0 for rate in self._rates.values())
        return (*self._factors.values(), *rates, *learned)


def lone(plan: Plan) -> tuple[Boundary, ...]:
    """Returns a plan's boundaries whose link has its line to itself: there a rate can be told.

    Where a chain meets a device twice, its two links share the device's line, and each alone is
    slower than that by as much as the other carries.
    """
    met: dict[str, list[Boundary]] = {}
    found = []
    for one in plan.boundaries():
        devices = [end for end in one[:2] if end != COORDINATOR and not is_node(end)]
        if devices:
            met.setdefault(devices[0], []).append(one)
        else:
            found.append(one)
    return (*found, *(some[0] for some in met.values() if len(some) == 1))


def differ(one: Sequence[float], other: Sequence[float], share: float) -> bool:
    """Says whether two states of a watch differ by more than a share anywhere."""
    return any(abs(a - b) > share * max(a, b) for a, b in zip(one, other, strict=True))


def _parts(host: HostProfile) -> list[float]:
    """Returns the seconds of a few runs of units, at the largest size."""
    each = [
        forward[-1] + backward[-1]
        for forward, backward in zip(host.forward_s, host.backward_s, strict=True)
    ]
    size = -(-len(each) // PARTS)
    return [sum(each[i : i + size]) for i in range(0, len(each), size)]


def _without_overhead(seen_s: float, believed_s: float) -> float:
    """Returns what a computation took by itself: what is believed, as far as that is possible."""
    return min(max(believed_s, seen_s - OVERHEAD_S), seen_s)


def _follow(old: float, new: float) -> float:
    """Averages a small change and believes a large one."""
    return (old + new) / 2 if max(old, new) <= NOISE * min(old, new) else new
