"""Options of a device, their lower bounds, and the memory of plans."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipar_jax.config import CohortConfig, Hosts, keeps_state
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.memory import StageSizes, find_need
from pipar_jax.cost_model.profile import Profile
from pipar_jax.schedule.actions import (
    BACKWARD,
    FORWARD,
    LOSS,
    UPDATE,
    Span,
    batch_samples,
    micro_batch_sizes,
)
from pipar_jax.schedule.keep import Keep, keep
from pipar_jax.schedule.plan import COORDINATOR, OWNER, Codecs, DevicePlan, Plan
from pipar_jax.simulator.predict import StageCosts


class DeviceOption(NamedTuple):
    """An option for the training of one device.

    Attributes:
      cut: Units on the device; 0 for all of them (FL).
      micro_batches: N.
      codecs: Codecs of activations and cotangents.
    """

    cut: int
    micro_batches: int = 1
    codecs: Codecs = Codecs()

    def device_plan(self) -> DevicePlan:
        """Returns the option as a device plan."""
        if not self.cut:
            return DevicePlan((), (OWNER,))
        return DevicePlan((self.cut,), (OWNER, COORDINATOR), self.micro_batches, (self.codecs,))


class LowerBound(NamedTuple):
    """Lower bounds of the time of a device's steps in a round, whatever other devices do.

    Attributes:
      alone_s: Seconds of its steps if no other device uses the server.
      server_s: Seconds of the server's computations for it.
      opening_s: Seconds from the round's release to its first activation at the server.
      closing_s: Seconds from its last update until the coordinator knows that it has stored the
        average.
      tail_s: Seconds from its last micro-batch's end on the server to its last update.
    """

    alone_s: float
    server_s: float
    opening_s: float
    closing_s: float
    tail_s: float

    @property
    def round_s(self) -> float:
        """Lower bound of the round, due to this device."""
        return self.alone_s + self.closing_s


def least(stages: StageCosts, device: int, option: DeviceOption, span: Span) -> LowerBound:
    """Returns the lower bound of an option.

    A step takes at least PiPar's recurrence with the micro-batches' own times and the link's delay:
    for a device that has the server to itself, all forwards first is the best order, since each
    cotangent returns as early as possible and the remaining work is the same in any order.

    Args:
      stages: Times and bytes.
      device: Index of the device.
      option: The option.
      span: Its steps in the round.
    """
    profile = stages.profile
    own, count = profile.devices[device], len(profile.units)
    mine, times = option.cut or count, stages.devices[device]
    sizes: dict[int, int] = {}
    for step in range(span.first, span.stop):
        samples = batch_samples(own.samples, profile.batch_size, step)
        sizes[samples] = sizes.get(samples, 0) + 1
    update_s = times.time_s(UPDATE, 0, mine, 0)
    alone_s = _transfer_s(own.down, 0.0)
    server_s, opening_s, tail_s = 0.0, math.inf, math.inf
    for samples, steps in sizes.items():
        if not option.cut:
            alone_s += steps * (times.time_s(LOSS, 0, count, samples) + update_s)
            continue
        parts = micro_batch_sizes(samples, option.micro_batches)
        alone = _step(stages, device, option, parts)
        alone_s += steps * (alone.seconds + update_s)
        server_s += steps * (alone.server_s + stages.server.time_s(UPDATE, mine, count, 0))
        opening_s = min(opening_s, alone.opening_s)
        tail_s = min(tail_s, alone.tail_s + update_s)
    weights = stages.averaged_bytes(0, mine)
    closing_s = _transfer_s(own.up, weights) + stages.average_s()
    closing_s += _transfer_s(own.down, weights) + _transfer_s(own.up, 0.0)
    if not option.cut:
        opening_s = tail_s = 0.0
    return LowerBound(alone_s, server_s, opening_s + _transfer_s(own.down, 0.0), closing_s, tail_s)


def round_bound_s(stages: StageCosts, all_least: Sequence[LowerBound]) -> float:
    """Returns the lower bound of a parallel round: of each device alone, and of the server."""
    alone_s = max(bound.round_s for bound in all_least)
    using = [bound for bound in all_least if bound.server_s]
    if not using:
        return alone_s
    # The update after the last micro-batch may come after the cotangent that the device waits for.
    update_s = stages.server.time_s(UPDATE, 0, len(stages.profile.units), 0)
    after_s = max(0.0, min(bound.tail_s + bound.closing_s for bound in using) - update_s)
    shared_s = min(bound.opening_s for bound in using) + sum(bound.server_s for bound in using)
    return max(alone_s, shared_s + after_s)


def sequential_bound_s(stages: StageCosts, all_least: Sequence[LowerBound], cut: int) -> float:
    """Returns the lower bound of a sequential epoch: steps in turn, with hand-overs between."""
    part, total_s = stages.part_bytes(0, cut), sum(bound.alone_s for bound in all_least)
    for other in stages.profile.devices if len(all_least) > 1 else ():
        total_s += _transfer_s(other.up, part) + _transfer_s(other.down, part)
        total_s -= _transfer_s(other.down, 0.0)  # the release, once for all devices
    return total_s


def nothing_kept(plan: Plan, copy: int) -> Keep:
    """Returns what a copy keeps in a run that may lose no host."""
    del plan, copy
    return Keep.NOTHING


def kept_in(hosts: Hosts, cohort: CohortConfig) -> Callable[[Plan, int], Keep]:
    """Returns a function from a plan and a copy to what the copy keeps of earlier moments.

    Args:
      hosts: The hosts of the run, some of which may be lost.
      cohort: How the state of a dropped device is treated.
    """
    if not (hosts.may_lose or hosts.may_lose_nodes):
        return nothing_kept
    return functools.partial(keep, keeps_state=keeps_state(cohort))


def memory_bytes(
    stages: StageCosts, plan: Plan, keeps: Callable[[Plan, int], Keep] = nothing_kept
) -> dict[str, int]:
    """Returns an upper bound of the memory of each host, by the profile of units.

    Residuals that two neighbouring units share are counted twice.

    Args:
      stages: Times and bytes.
      plan: The plan.
      keeps: What a copy keeps of an earlier moment.
    """
    profile = stages.profile
    samples = [device.samples for device in profile.devices]
    window = int(profile.window_bytes or sys.maxsize // 4)
    sizes = _ProfileSizes(profile)
    kept = functools.partial(keeps, plan)
    return {
        host: find_need(sizes, plan, host, samples, profile.batch_size, window, kept).total
        for host in plan.hosts()
    }


def excess(
    stages: StageCosts, plan: Plan, keeps: Callable[[Plan, int], Keep] = nothing_kept
) -> str | None:
    """Returns a message about the first host whose memory a plan exceeds, or None.

    Args:
      stages: Times and bytes.
      plan: The plan.
      keeps: What a copy keeps of an earlier moment.
    """
    profile = stages.profile
    devices, nodes = profile.devices, profile.nodes
    others = [*(device.host for device in devices), *(node.host for node in nodes)]
    if all(host.memory_bytes is None for host in (profile.server, *others)):
        return None
    limits = {
        name: (profile.server if name == COORDINATOR else profile.of(name).host).memory_bytes
        for name in plan.hosts()
    }
    for name, needed in memory_bytes(stages, plan, keeps).items():
        limit = limits[name]
        if limit is not None and needed > limit:
            return f"{name} needs {needed / 1e6:.0f} MB of {limit / 1e6:.0f}"
    return None


class _ProfileSizes:
    """The bytes of a profile's units; see ``cost_model.memory.Sizes``."""

    def __init__(self, profile: Profile) -> None:
        self._facts, self.units = profile.units, len(profile.units)
        self._target_bytes = sum(profile.target_bytes)
        self._side_bytes = profile.side_bytes

    def replica(self, units: range) -> int:
        """Returns the bytes of weights, gradients, statistics and optimiser state."""
        some = [self._facts[unit] for unit in units]
        return int(
            sum(2 * unit.parameter_bytes + unit.optimizer_bytes + unit.state_bytes for unit in some)
        )

    def kept(self, units: range, keeps: Keep) -> int:
        """Returns the bytes of optimiser states, and of the rest where it is kept too."""
        some = [self._facts[unit] for unit in units]
        opt_state = sum(unit.optimizer_bytes for unit in some)
        whole = sum(unit.parameter_bytes + unit.state_bytes for unit in some) + opt_state
        own = opt_state if Keep.OPTIMIZER in keeps else 0
        return int(own + keeps.wholes * whole)

    def average(self, units: range) -> int:
        """Returns the bytes of weights and statistics; rules of the average are not profiled."""
        some = [self._facts[unit] for unit in units]
        return int(sum(unit.parameter_bytes + unit.state_bytes for unit in some))

    def stage(self, units: range, samples: int) -> StageSizes:
        """Returns the bytes of a micro-batch."""
        beside = {name for unit in self._facts[units.start :] for name in unit.sides}
        x = 0.0
        if units.start:
            x = samples * self._facts[units.start - 1].output_bytes
            x += samples * (self._target_bytes + sum(self._side_bytes[name] for name in beside))
        y = samples * self._facts[units.stop - 1].output_bytes
        kept = samples * sum(self._facts[unit].residual_bytes for unit in units)
        if units.stop == self.units:
            return StageSizes(int(x), 0, 0, int(kept))
        return StageSizes(int(x), int(kept), int(y))


class _Step(NamedTuple):
    """A step of a device that has the server to itself, without updates."""

    seconds: float
    server_s: float
    opening_s: float
    tail_s: float


def _step(stages: StageCosts, device: int, option: DeviceOption, parts: Sequence[int]) -> _Step:
    """Returns the recurrence with each micro-batch's own times and the links' delays."""
    own, count, cut = stages.profile.devices[device], len(stages.profile.units), option.cut
    times, costs = stages.devices[device], {}
    for size in set(parts):
        costs[size] = (
            times.time_s(FORWARD, 0, cut, size),
            own.up.occupied_s(stages.up_bytes(cut, size, option.codecs.activation)),
            stages.server.time_s(LOSS, cut, count, size),
            own.down.occupied_s(stages.down_bytes(cut, size, option.codecs.cotangent)),
            times.time_s(BACKWARD, 0, cut, size),
        )
    all_forwards_s = sum(costs[size][0] for size in parts)
    forward_s = up_s = server_s = down_s = backward_s = 0.0
    for size in parts:
        cf, u, s, d, cb = costs[size]
        forward_s += cf
        up_s = max(forward_s, up_s) + u
        server_s = max(up_s + own.up.delay_s, server_s) + s
        down_s = max(server_s, down_s) + d
        backward_s = max(down_s + own.down.delay_s, backward_s, all_forwards_s) + cb
    first, last = costs[parts[0]], costs[parts[-1]]
    return _Step(
        backward_s,
        sum(costs[size][2] for size in parts),
        first[0] + first[1] + own.up.delay_s,
        last[3] + own.down.delay_s + last[4],
    )


def _transfer_s(link: LinkModel, nbytes: float) -> float:
    return link.transfer_s(nbytes)
