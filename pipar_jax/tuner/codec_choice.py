"""The tuner's choice of codecs for activations and cotangents, and of their bits.

With ``tuner.codecs=auto`` and ``safe`` a tensor is sent raw or by ``bits:K``. The search uses the
fewest bits allowed, by ``tuner.activation_bits`` and ``tuner.cotangent_bits`` or by what trials
allow, since more bits are never faster. Then each direction of each boundary is given as many bits
as cost no time, up to raw. From a list of codecs the search chooses the fastest, and raw where a
codec gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import (
    RAW,
    ROLES,
    CodecCandidates,
    bit_widths,
    candidates_of,
)
from pipar_jax.cost_model.profile import DeviceProfile, Profile
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.actions import micro_batch_sizes
from pipar_jax.schedule.plan import OWNER, Plan
from pipar_jax.simulator.predict import PlanEstimate, StageCosts, estimate

#: Share of an epoch that may be given up for more bits.
SLACK = 0.01


def candidates_for(config: Config, profile: Profile) -> CodecCandidates:
    """Returns the codecs to choose from for the network and the codecs of a profile.

    Args:
      config: Resolved configuration.
      profile: The profile of hosts and links; if it is from before codecs were looked at, it has
        no times of codecs, and ``tuner.codecs=safe`` chooses none.
    """
    candidates = candidates_of(config, profile.model)
    if candidates.safe and not {RAW, *profile.codecs}.issuperset(candidates.names()):
        return candidates._replace(objection="the profile has no times of bits:K")
    return candidates


def check_measured(candidates: CodecCandidates, profile: Profile) -> None:
    """Checks that a profile has all candidate codecs.

    Raises:
      ConfigError: A codec is missing.
    """
    wanted = {name for role in ROLES for name in candidates.allowed(role)}
    if candidates.by_bits:
        wanted |= set(candidates.names())
    if unknown := sorted(wanted - {RAW} - set(profile.codecs)):
        raise ConfigError(
            f"{', '.join(unknown)} may be used (tuner.codecs, pipeline.activation_codec and "
            "cotangent_codec), but the profile does not have it: it has "
            f"raw{''.join(f', {name}' for name in profile.codecs)}"
        )


class Slot(NamedTuple):
    """A kind of tensor on equal links, whose codec can be chosen.

    Attributes:
      devices: Devices whose tensors take the same way: equal devices, or all that share two nodes.
      boundary: Index of the boundary in their chains.
      role: Activation or cotangent.
    """

    devices: tuple[int, ...]
    boundary: int
    role: str

    def codec(self, plan: Plan) -> str:
        """Returns the codec of the slot in a plan."""
        name: str = getattr(plan.devices[self.devices[0]].codecs[self.boundary], self.role)
        return name

    def with_codec(self, plan: Plan, name: str) -> Plan:
        """Returns the plan with another codec in the slot."""
        chains = list(plan.devices)
        for device in self.devices:
            codecs = list(chains[device].codecs)
            codecs[self.boundary] = dataclasses.replace(codecs[self.boundary], **{self.role: name})
            chains[device] = dataclasses.replace(chains[device], codecs=tuple(codecs))
        return dataclasses.replace(plan, devices=tuple(chains))

    def ends(self, plan: Plan, device: int) -> tuple[str, str]:
        """Returns the sender and the receiver for one of its devices."""
        below, above = (plan.host(device, self.boundary + i) for i in range(2))
        return (below, above) if self.role == "activation" else (above, below)


def slots(plan: Plan, profile: Profile) -> Iterator[Slot]:
    """Yields the slots of a plan, one for all tensors on equal links.

    Args:
      plan: The plan.
      profile: The profile of hosts and links.
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


#: Returns a plan's seconds per epoch; None once the limit of evaluations is reached.
Seconds = Callable[[Plan], float | None]


def speed_up(
    plan: Plan, all_slots: Sequence[Slot], candidates: CodecCandidates, seconds: Seconds
) -> Plan:
    """Returns the plan with the codecs that make it faster, changed one slot after another.

    Args:
      plan: A plan.
      all_slots: The slots that may get another codec.
      candidates: The codecs to choose from.
      seconds: Evaluates a plan.
    """
    best_s = seconds(plan)
    if best_s is None:
        return plan
    improved = True
    while improved:
        improved = False
        for slot in all_slots:
            for name in candidates.allowed(slot.role):
                tried = slot.with_codec(plan, name)
                tried_s = seconds(tried)
                if tried_s is not None and tried_s < best_s:
                    plan, best_s, improved = tried, tried_s, True
    return plan


def raise_precision(
    plan: Plan, all_slots: Iterable[Slot], candidates: CodecCandidates, seconds: Seconds
) -> Plan:
    """Returns the plan with as many bits in each slot as cost no time.

    Args:
      plan: The best plan found.
      all_slots: The slots that may get more bits.
      candidates: The codecs to choose from.
      seconds: Evaluates a plan.
    """
    began_s = seconds(plan)
    if began_s is None:
        return plan
    deadline_s = began_s * (1 + SLACK)
    for slot in sorted(all_slots, key=lambda slot: slot.role, reverse=True):  # cotangents first
        rungs = _rungs(candidates, slot, plan)
        low, high = rungs.index(slot.codec(plan)), len(rungs)
        # Time increases with the bits; raw, the last, needs no coding and may be faster than many
        # bits.
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


def _rungs(candidates: CodecCandidates, slot: Slot, plan: Plan) -> tuple[str, ...]:
    """Returns the candidates of a slot, from the fewest bits to raw; a list is not ordered."""
    if candidates.by_bits:
        return bit_widths(candidates.tuner, slot.role)
    present = slot.codec(plan)
    goes_raw = present != RAW and RAW in candidates.allowed(slot.role)
    return (present, RAW) if goes_raw else (present,)


class Reason(NamedTuple):
    """The reason for the codec of a slot; times are those of a full mini-batch.

    Attributes:
      slot: The tensor and its links.
      chosen: Its codec in the plan.
      other: The alternative: raw, or the codec that would have been chosen.
      raw_bytes: Bytes before coding.
      saved_s: Seconds of transfer saved by coding.
      coding_s: Seconds of encoding and decoding.
      epoch_s: Predicted epoch.
      other_s: Predicted epoch with the alternative.
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
        """Returns the reason as a sentence."""
        chosen, other = f"{self.epoch_s:.4g} s per epoch", f"{self.other_s:.4g} s"
        if self.chosen != RAW:
            return f"on: {chosen}, {other} without"
        why = "the transfer is hidden behind other work"
        if self.coding_s >= self.saved_s:
            why = "the link is faster than the codec"
        elif self.other_s > self.epoch_s:
            why = "coding delays each transfer by more than it saves"
        return f"off: {why}; {chosen}, {other} with it"


def reasons(stages: StageCosts, candidates: CodecCandidates, judged: PlanEstimate) -> list[Reason]:
    """Returns the reason for the codec of each slot; empty if there is no choice.

    Args:
      stages: Times and bytes.
      candidates: The codecs to choose from.
      judged: The chosen plan.
    """
    plan, lines = judged.plan, []
    links = stages.links(plan)
    for slot in slots(plan, stages.profile) if candidates.chosen else ():
        chosen = slot.codec(plan)
        options = [name for name in candidates.allowed(slot.role)
                   if name != RAW and name in stages.profile.codecs]  # fmt: skip
        if chosen == RAW and not options:
            continue
        coded = (
            chosen if chosen != RAW else min(options, key=lambda option: stages.codec(option).ratio)
        )
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
        lines.append(
            Reason(slot, chosen, other, raw_bytes, saved_s, coding_s, judged.epoch_s, other_s)
        )
    return lines
