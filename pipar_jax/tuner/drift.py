"""A profile that tracks the speed of hosts and the rates of links during a run.

The times of a host are those of the profile multiplied by one factor: the measured durations of its
computations relative to the profile's. A host with predicted times has a learner instead, which is
fed with the durations of its stages; its factor is that of its optimiser steps. The overhead of
threads and messages per computation, and what a rest before it may have added, is subtracted. The
rate of a link is the number of bytes of consecutive frames divided by their duration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import HostProfile, Profile
from pipar_jax.schedule.actions import ALL, UPDATE, ActionKind
from pipar_jax.schedule.plan import COORDINATOR, Boundary, Plan, device_name, is_node, node_name
from pipar_jax.simulator.predict import HostTimes

#: Minimum measurement of a rate; less is noise of timers.
LEAST_BYTES, LEAST_S = 48 << 10, 0.05
#: Changes by less than this factor are averaged as noise; larger ones are adopted.
NOISE = 1.25
#: Maximum overhead per computation in a run: threads wake up and messages are handled meanwhile.
#: Measured on a core that trained: 0.4 to 1.2 ms.
OVERHEAD_S = 0.0015
#: Bound of the factor by which a host may become slower or faster: larger reports are not
#: plausible, and products of such numbers overflow.
MOST_FACTOR = 1e6
#: Runs of units whose times show whether a host's times have changed.
PARTS = 4


class Computed(Protocol):
    """Observations of one kind of computation."""

    @property
    def device(self) -> int:
        """The device; ALL for an update that serves all devices."""

    @property
    def stage(self) -> int:
        """Index of the stage."""

    @property
    def kind(self) -> ActionKind:
        """F, B, L or U."""

    @property
    def samples(self) -> int:
        """Samples in its micro-batch."""

    @property
    def times(self) -> int:
        """Number of computations."""

    @property
    def median_s(self) -> float:
        """Total duration in seconds."""


class Learns(Protocol):
    """Learns the times of a host; see ``predictor.online.Learner``."""

    def predict_s(self, case: tuple[ActionKind, int, int, int]) -> float:
        """Returns the estimated duration of a stage; see ``observe``."""

    def observe(self, case: tuple[ActionKind, int, int, int], seconds: float) -> None:
        """Records the duration of a stage: F, B or L, first unit, one past the last, samples."""

    def learn(self) -> object:
        """Updates the estimates from the records."""

    def profile(self, sizes: Sequence[int]) -> HostProfile:
        """Returns the times of all units at some micro-batch sizes."""


class LinkThroughput(NamedTuple):
    """Consecutive frames in one direction of a link since its start.

    Attributes:
      nbytes: Number of bytes.
      seconds: Their duration.
    """

    nbytes: float = 0.0
    seconds: float = 0.0


class ProfileTracker:
    """Tracks the hosts and links of a profile.

    Args:
      profile: The initial profile.
      learners: Learners of hosts with predicted times.
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
        """Adds durations of a host's computations.

        Args:
          host: Name of the host.
          plan: The plan of the computations.
          seen: The computations.
        """
        learner = self._learners.get(host)
        actual_s = expected_s = 0.0
        learned = False
        for computed in seen:
            units = self._units(plan, computed)
            if learner is not None and computed.kind != UPDATE:
                case = computed.kind, units.start, units.stop, computed.samples
                believed_s = learner.predict_s(case)
                learner.observe(case, _without(OVERHEAD_S, computed.median_s, believed_s))
                learned = True
                continue
            times, factor = self._times[host], self._factors[host]
            alone_s = times.time_s(computed.kind, units.start, units.stop, computed.samples)
            # Whether the host has rested before it is not known here.
            rest_s = factor * times.after_rest_s(computed.kind, units.start, units.stop)
            actual_s += computed.times * _without(
                OVERHEAD_S + rest_s, computed.median_s, factor * alone_s
            )
            expected_s += computed.times * alone_s
        if actual_s > 0 and expected_s > 0:
            factor = min(max(actual_s / expected_s, 1 / MOST_FACTOR), MOST_FACTOR)
            self._factors[host] = _follow(self._factors[host], factor)
        if learner is not None and learned:
            learner.learn()
            self._learned[host] = learner.profile(self._hosts[host].sizes)

    def _units(self, plan: Plan, computed: Computed) -> range:
        """Returns the units of a computation's stage."""
        device = 0 if computed.device == ALL else computed.device
        return plan.units(device, computed.stage, len(self._base.units))

    def carried(self, boundary: Boundary, target: str, total: LinkThroughput) -> None:
        """Adds the throughput of a link to one of its ends.

        All links of a device share its line; the line between two nodes is that above the lower.

        Args:
          boundary: The boundary of the link.
          target: The receiving end.
          total: Throughput since the start of the link.
        """
        before = self._carried.setdefault((boundary, target), total)
        nbytes, seconds = total.nbytes - before.nbytes, total.seconds - before.seconds
        if nbytes < LEAST_BYTES or seconds < LEAST_S:
            return
        self._carried[boundary, target] = total
        devices = [host for host in boundary[:2] if host != COORDINATOR and not is_node(host)]
        line = (devices or [boundary.lower])[0]
        way = line, (target != line)
        self._rates[way] = _follow(self._rates[way] or nbytes / seconds, nbytes / seconds)

    def profile(self) -> Profile:
        """Returns the current profile."""
        return dataclasses.replace(
            self._base,
            server=self._host(COORDINATOR),
            devices=tuple(
                dataclasses.replace(
                    device,
                    host=self._host(device_name(index)),
                    up=self._line(device.up, device_name(index), True),
                    down=self._line(device.down, device_name(index), False),
                )
                for index, device in enumerate(self._base.devices)
            ),
            nodes=tuple(
                dataclasses.replace(
                    node,
                    host=self._host(node_name(index + 1)),
                    up=self._line(node.up, node_name(index + 1), True),
                    down=self._line(node.down, node_name(index + 1), False),
                )
                for index, node in enumerate(self._base.nodes)
            ),
        )

    def _host(self, name: str) -> HostProfile:
        """Returns the current profile of a host."""
        slowed = self._hosts[name].slowed(self._factors[name])
        if name not in self._learners:
            return slowed
        return dataclasses.replace(
            self._learned.get(name, self._hosts[name]),
            update_s=slowed.update_s,
            memory_bytes=slowed.memory_bytes,
        )

    def _line(self, link: LinkModel, name: str, up: bool) -> LinkModel:
        """Returns the current model of one direction of a host's line."""
        return dataclasses.replace(link, rate_bytes_s=self._rates[name, up])

    def state(self) -> tuple[float, ...]:
        """Returns all factors, rates and learned times, for the detection of changes."""
        learned = (seconds for name in self._learners for seconds in _parts(self._host(name)))
        rates = (rate or 0.0 for rate in self._rates.values())
        return (*self._factors.values(), *rates, *learned)


def lone(plan: Plan) -> tuple[Boundary, ...]:
    """Returns the boundaries whose link does not share its line, so that its rate is measurable.

    If a chain visits a device twice, its two links share the device's line, and each alone is
    slower than the line.
    """
    met: dict[str, list[Boundary]] = {}
    changes = []
    for boundary in plan.boundaries():
        devices = [end for end in boundary[:2] if end != COORDINATOR and not is_node(end)]
        if devices:
            met.setdefault(devices[0], []).append(boundary)
        else:
            changes.append(boundary)
    return (*changes, *(some[0] for some in met.values() if len(some) == 1))


def differ(before: Sequence[float], after: Sequence[float], share: float) -> bool:
    """Returns whether any value of two states differs by more than a share."""
    return any(abs(a - b) > share * max(a, b) for a, b in zip(before, after, strict=True))


def _parts(host: HostProfile) -> list[float]:
    """Returns the seconds of a few runs of units, at the largest size."""
    each = [
        forward[-1] + backward[-1]
        for forward, backward in zip(host.forward_s, host.backward_s, strict=True)
    ]
    size = -(-len(each) // PARTS)
    return [sum(each[i : i + size]) for i in range(0, len(each), size)]


def _without(overhead_s: float, seen_s: float, believed_s: float) -> float:
    """Returns the duration of a computation without overhead of at most so many seconds."""
    return min(max(believed_s, seen_s - overhead_s), seen_s)


def _follow(old: float, new: float) -> float:
    """Averages a small change and adopts a large one."""
    return (old + new) / 2 if max(old, new) <= NOISE * min(old, new) else new
