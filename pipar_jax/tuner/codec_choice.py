"""Which codecs the tuner may take for activations and cotangents, and how many bits it gives them.

With ``tuner.codecs=auto`` a tensor goes raw or in ``bits:K``. The search takes the fewest bits that
the floors allow, ``tuner.activation_bits`` and ``tuner.cotangent_bits``: more are never faster.
Then each boundary's tensors get back, in each direction, as many bits as cost no time, up to all.
Of a list of codecs, the search takes what is fastest, and what is as fast without goes raw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import AUTO, RAW, ROLES, allowed, bit_widths, names
from pipar_jax.cost_model.profile import DeviceProfile, Profile
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.actions import micro_batch_sizes
from pipar_jax.schedule.plan import OWNER, Plan
from pipar_jax.simulator.predict import PlanEstimate, StageCosts, estimate

#: What may be lost of an epoch's seconds for the sake of more bits, as a share.
SLACK = 0.01


def check_measured(config: Config, profile: Profile) -> None:
    """Checks that a profile has every codec that a plan may come to have.

    Raises:
      ConfigError: It lacks one.
    """
    wanted = {name for role in ROLES for name in allowed(config, role)}
    if config.tuner.codecs == AUTO:
        wanted |= set(names(config))
    if unknown := sorted(wanted - {RAW} - set(profile.codecs)):
        raise ConfigError(
            f"{', '.join(unknown)} may be used (tuner.codecs, pipeline.activation_codec and "
            "cotangent_codec), but the profile does not have it: it knows raw"
            f"{''.join(f', {name}' for name in profile.codecs)}"
        )


class Slot(NamedTuple):
    """A tensor on its way over like links.

    Attributes:
      devices: Those whose tensors have the same way: equal devices, or all that share two nodes.
      boundary: Which boundary of their chains it crosses, counted from 0.
      role: Activation or cotangent.
    """

    devices: tuple[int, ...]
    boundary: int
    role: str

    def codec(self, plan: Plan) -> str:
        """Returns its codec under a plan."""
        name: str = getattr(plan.devices[self.devices[0]].codecs[self.boundary], self.role)
        return name

    def with_codec(self, plan: Plan, name: str) -> Plan:
        """Returns the plan with another codec for it."""
        chains = list(plan.devices)
        for device in self.devices:
            codecs = list(chains[device].codecs)
            codecs[self.boundary] = dataclasses.replace(codecs[self.boundary], **{self.role: name})
            chains[device] = dataclasses.replace(chains[device], codecs=tuple(codecs))
        return dataclasses.replace(plan, devices=tuple(chains))

    def ends(self, plan: Plan, device: int) -> tuple[str, str]:
        """Returns the hosts that send and receive it for one of its devices."""
        below, above = (plan.host(device, self.boundary + i) for i in range(2))
        return (below, above) if self.role == "activation" else (above, below)


def slots(plan: Plan, profile: Profile) -> Iterator[Slot]:
    """Yields the tensors that go from one host to another, once for those with like links.

    Args:
      plan: The plan.
      profile: What hosts and links are like.
    """
    equal: dict[DeviceProfile, int] = {}
    groups: dict[tuple[int, object], list[int]] = {}
    for device, chain in enumerate(plan.devices):
        for boundary, cut in enumerate(chain.cuts):
            hosts = chain.hosts[boundary : boundary + 2]
            if hosts[0] == hosts[1]:
                continue
            owner = None
            if OWNER in hosts:
                owner = equal.setdefault(profile.devices[device], device)
            alike = cut, hosts, chain.codecs[boundary], chain.micro_batches, owner
            groups.setdefault((boundary, alike), []).append(device)
    for (boundary, _), devices in groups.items():
        for role in ROLES:
            yield Slot(tuple(devices), boundary, role)


#: Returns a plan's seconds per epoch; None once no more are to be judged.
Seconds = Callable[[Plan], float | None]


def speed_up(plan: Plan, all_slots: Sequence[Slot], config: Config, seconds: Seconds) -> Plan:
    """Returns the plan with what codecs make it faster, changed one slot after another.

    Args:
      plan: A plan.
      all_slots: What may get another codec.
      config: Resolved configuration.
      seconds: Judges a plan.
    """
    best_s = seconds(plan)
    if best_s is None:
        return plan
    improved = True
    while improved:
        improved = False
        for slot in all_slots:
            for name in allowed(config, slot.role):
                tried = slot.with_codec(plan, name)
                tried_s = seconds(tried)
                if tried_s is not None and tried_s < best_s:
                    plan, best_s, improved = tried, tried_s, True
    return plan


def raise_precision(
    plan: Plan, all_slots: Iterable[Slot], config: Config, seconds: Seconds
) -> Plan:
    """Returns the plan with as many bits in each slot as cost no time.

    Args:
      plan: The best plan found.
      all_slots: What may get other bits.
      config: Resolved configuration.
      seconds: Judges a plan.
    """
    began_s = seconds(plan)
    if began_s is None:
        return plan
    deadline_s = began_s * (1 + SLACK)
    for slot in sorted(all_slots, key=lambda one: one.role, reverse=True):  # cotangents first
        rungs = _rungs(config, slot, plan)
        low, high = rungs.index(slot.codec(plan)), len(rungs)
        # Time grows with the bits; raw, the last, needs no coding and may be faster than many.
        if low < high - 1:
            raw_s = seconds(slot.with_codec(plan, RAW))
            if raw_s is not None and raw_s <= deadline_s:
                plan = slot.with_codec(plan, RAW)
                continue
            high -= 1
        while high - low > 1:
            middle = (low + high) // 2
            middle_s = seconds(slot.with_codec(plan, rungs[middle]))
            if middle_s is not None and middle_s <= deadline_s:
                low = middle
            else:
                high = middle
        plan = slot.with_codec(plan, rungs[low])
    return plan


def _rungs(config: Config, slot: Slot, plan: Plan) -> tuple[str, ...]:
    """Returns what a slot may get, from the fewest bits to raw; a list has no order between."""
    if config.tuner.codecs == AUTO:
        return bit_widths(config, slot.role)
    present = slot.codec(plan)
    goes_raw = present != RAW and RAW in allowed(config, slot.role)
    return (present, RAW) if goes_raw else (present,)


class Reason(NamedTuple):
    """Why a tensor is coded on its way, or is not; all times of a full mini-batch.

    Attributes:
      slot: The tensor and its links.
      chosen: Its codec in the plan.
      other: What it is compared with: raw, or the codec that would have been chosen.
      raw_bytes: Its bytes before a codec.
      saved_s: Seconds of transfer that the one that is not raw saves.
      coding_s: Seconds of encoding and decoding that it costs.
      epoch_s: Predicted epoch.
      other_s: Predicted epoch with the other one.
    """

    slot: Slot
    chosen: str
    other: str
    raw_bytes: float
    saved_s: float
    coding_s: float
    epoch_s: float
    other_s: float

    def words(self) -> str:
        """Returns the reason in a sentence."""
        chosen, other = f"{self.epoch_s:.4g} s per epoch", f"{self.other_s:.4g} s"
        if self.chosen != RAW:
            return f"on: {chosen}, {other} without"
        why = "the transfer is hidden behind other work"
        if self.coding_s >= self.saved_s:
            why = "the link is faster than the codec"
        elif self.other_s > self.epoch_s:
            why = "coding comes before each transfer, and that delays more than it saves"
        return f"off: {why}; {chosen}, {other} with it"


def reasons(stages: StageCosts, config: Config, judged: PlanEstimate) -> list[Reason]:
    """Returns for each tensor and link why its codec is what it is; nothing where none is chosen.

    Args:
      stages: Times and bytes.
      config: Resolved configuration.
      judged: The plan that was chosen.
    """
    plan, found = judged.plan, []
    links = stages.links(plan)
    for slot in slots(plan, stages.profile) if config.tuner.codecs else ():
        chosen = slot.codec(plan)
        options = [name for name in allowed(config, slot.role)
                   if name != RAW and name in stages.profile.codecs]  # fmt: skip
        if chosen == RAW and not options:
            continue
        coded = chosen if chosen != RAW else min(options, key=lambda one: stages.codec(one).ratio)
        other = RAW if chosen != RAW else coded
        device = slot.devices[0]
        chain, link = plan.devices[device], links[slot.ends(plan, device)]
        sizes = micro_batch_sizes(stages.profile.batch_size, chain.micro_batches)
        cut = chain.cuts[slot.boundary]
        wire = stages.up_bytes if slot.role == "activation" else stages.down_bytes
        saved_s = sum(
            link.occupied_s(wire(cut, size, RAW)) - link.occupied_s(wire(cut, size, coded))
            for size in sizes
        )
        raw_bytes, costs = stages.cut_bytes(cut, sum(sizes)), stages.codec(coded)
        coding_s = (costs.encode_s_per_byte + costs.decode_s_per_byte) * raw_bytes
        other_s = estimate(stages, slot.with_codec(plan, other)).epoch_s
        found.append(
            Reason(slot, chosen, other, raw_bytes, saved_s, coding_s, judged.epoch_s, other_s)
        )
    return found
