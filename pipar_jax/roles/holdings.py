"""Which bundles fit: the weights, statistics and states of the units that their sender holds.

A bundle is a set of named arrays. What it must hold follows from the plan, the sender and what was
asked: these groups, of these units, with these paths, shapes and kinds of numbers; a host cannot
write into what is another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from comms import Allowance, ChannelError, Message
from comms.arrays import Array
from pipar_jax.aggregation.rules import rule
from pipar_jax.config import Config
from pipar_jax.errors import ProtocolError, RunError
from pipar_jax.protocol.messages import LookSeen
from pipar_jax.protocol.registry import peek
from pipar_jax.protocol.values import MOST_S
from pipar_jax.runtime import weight_bundle
from pipar_jax.runtime.moves import local_to, moves
from pipar_jax.schedule.actions import ALL, COMPUTE, EVALUATE, Span
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.plan import OWNER, Plan, host_index, is_node
from pipar_jax.training import optimizer
from stages import Model
from stages.trees import PyTree

#: For each group and part the units that a bundle holds of it.
Wanted = dict[str, dict[str, tuple[str, ...]]]
#: The group of what all copies have in common, as ``migration.WHOLE``, and a lone part's.
WHOLE, PART = "whole", "part"
_KINDS = weight_bundle.ROW_KINDS
#: What hosts may send each other before there is a plan: bytes that a link is timed with.
SURVEYED = Allowance(tensor_bytes=0, bundle_bytes=33 << 20, bundle_tensors=1)
_ROW_BYTES = 7 * 8 + 2 * 8


class _Like(NamedTuple):
    """What an array has to be."""

    shape: tuple[int, ...]
    kind: str
    nbytes: int


class Holdings:
    """What bundles hold of one model.

    Attributes:
      names: The model's units in order.

    Args:
      model: The whole model.
      config: Resolved configuration: its optimiser and its rule of aggregation.
    """

    def __init__(self, model: Model, config: Config) -> None:
        self._model, self.names = model, model.unit_names
        self._tx = optimizer.build(
            config.optimizer, steps=1, proximal_mu=config.aggregation.proximal_mu
        )
        self._rule = rule(config.aggregation)
        self._units = {unit.name: unit for unit in model.units}
        self._known: dict[tuple[str, str], dict[str, _Like]] = {}

    def trained(self, plan: Plan, host: str) -> Wanted:
        """Returns what a host gives to the average."""
        local = set(plan.local_stages(host))
        found: Wanted = {}
        for device, one in enumerate(plan.devices):
            for stage in range(one.stages):
                if plan.host(device, stage) != host or stage in local:
                    continue
                parts = found.setdefault(str(replica_key(plan, device, stage)[0]), {})
                units = tuple(self.names[i] for i in plan.units(device, stage, len(self.names)))
                for part in ("params", "state"):
                    merged = (*parts.get(part, ()), *units)
                    parts[part] = tuple(dict.fromkeys(merged))
        return found

    def stored(self, plan: Plan, host: str) -> Wanted:
        """Returns what a host is given back of the average."""
        count = len(self.names)
        local = plan.local_units(host, count)
        units = tuple(self.names[i] for i in plan.held_units(host, count) if i not in local)
        return {WHOLE: {"params": units, "state": units}}

    def part(self, plan: Plan, device: int) -> Wanted:
        """Returns the device part, as it is handed on."""
        one = plan.devices[device]
        units = tuple(
            self.names[unit]
            for stage in range(one.stages)
            if one.hosts[stage] == OWNER
            for unit in plan.units(device, stage, len(self.names))
        )
        return {PART: {"params": units, "state": units, "opt": units}}

    def fetched(self, plan: Plan, host: str) -> Wanted:
        """Returns what lives together on a host."""
        units = tuple(self.names[i] for i in plan.local_units(host, len(self.names)))
        return {PART: {"params": units, "state": units}}

    def given(self, old: Plan, new: Plan, host: str) -> Wanted:
        """Returns what leaves a host when one plan follows another."""
        found = self._moved(old, new, host, leaves=True)
        count = len(self.names)
        units = tuple(self.names[i] for i in local_to(host, old, besides=new, units=count))
        if units:
            rule = units if old.weights == "copy" else ()
            found[WHOLE] = {"params": units, "state": units, "rule_state": rule}
        return found

    def adopted(self, old: Plan, new: Plan, host: str) -> Wanted:
        """Returns what comes to a host when one plan follows another."""
        found = self._moved(old, new, host, leaves=False)
        count = len(self.names)
        gained = [one.unit for one in moves(old, new, count) if one.target == host]
        units = tuple(self.names[i] for i in dict.fromkeys(gained))
        local = tuple(self.names[i] for i in local_to(host, new, besides=old, units=count))
        found[WHOLE] = {"params": units, "state": units, "rule_state": local}
        return found

    def nbytes(self, wanted: Wanted) -> int:
        """Returns the bytes of what a bundle has to hold."""
        return sum(
            one.nbytes
            for parts in wanted.values()
            for part, units in parts.items()
            for unit in units
            for one in self._arrays(part, unit).values()
        )

    def allowance(
        self,
        plans: Sequence[Plan],
        host: str,
        rounds: Sequence[Sequence[Span]],
        tensor_bytes: int,
    ) -> Allowance:
        """Returns how much a host may send: as much as its largest bundle, and a little more.

        Args:
          plans: The plan in force, and the one that is changed to.
          host: The host's name.
          rounds: The run's rounds.
          tensor_bytes: Bytes of its largest tensor outside bundles.
        """
        plan = plans[-1]
        bundles = [self.trained(plan, host), self.fetched(plan, host)]
        if plan.order == "sequential" and not is_node(host):
            bundles.append(self.part(plan, host_index(host)))
        if len(plans) > 1:
            bundles.append(self.given(plans[0], plan, host))
        rows = 2 * max(_rows(one, host, spans) for one in plans for spans in rounds) + 1024
        return self.room(bundles, tensor_bytes, rows * _ROW_BYTES)

    def room(self, bundles: Sequence[Wanted], tensor_bytes: int, least_bytes: int = 0) -> Allowance:
        """Returns how much lets some bundles pass, or others of so many bytes."""
        largest = max(self.nbytes(one) for one in bundles)
        tensors = max(self.count(one) for one in bundles)
        return Allowance(
            tensor_bytes=tensor_bytes,
            # Codecs may make a small array larger.
            bundle_bytes=max(largest + largest // 8 + 1024 * tensors, least_bytes),
            bundle_tensors=max(tensors, 2),
        )

    def count(self, wanted: Wanted) -> int:
        """Returns how many arrays a bundle has to hold."""
        return sum(
            len(self._arrays(part, unit))
            for parts in wanted.values()
            for part, units in parts.items()
            for unit in units
        )

    def arrays(
        self, message: Message | None, local: dict[str, PyTree], wanted: Wanted, peer: str
    ) -> dict[str, PyTree]:
        """Returns a host's arrays: its own if it lives here, or those of a bundle.

        Raises:
          ProtocolError: The bundle is missing, or holds something else.
        """
        if message is None:
            return local
        if message.kind == "bundle":
            return self.read(message, wanted, peer)
        said = peek(message)
        if count := self.count(wanted):
            raise ProtocolError(
                f"{peer} sent {said.name if said else ''!r} without its {count} arrays of "
                f"{_summary(wanted)}"
            )
        return {}

    def read(self, message: Message, wanted: Wanted, peer: str) -> dict[str, PyTree]:
        """Returns a bundle's groups, parts and units.

        Args:
          message: What arrived.
          wanted: What it has to hold.
          peer: Who sent it, in words.

        Raises:
          ProtocolError: It holds something else.
        """
        what = f"{peer} sent {message.name!r}"
        groups = unpacked(message, peer)
        for group, parts in groups.items():
            for part, units in parts.items():
                odd = [unit for unit in units if unit not in wanted.get(group, {}).get(part, ())]
                if odd:
                    raise ProtocolError(
                        f"{what} with {group[:40]!r}/{part[:40]!r}/{odd[0][:80]!r}, which the plan "
                        f"has not for it (expected of it: {_summary(wanted)})"
                    )
        for group, needed in wanted.items():
            for part, names in needed.items():
                for unit in names:
                    found = groups.get(group, {}).get(part, {}).get(unit, {})
                    self._check(found, part, unit, f"{what} with {group}/{part}/{unit}")
        return groups

    def _check(self, found: Mapping[str, PyTree], part: str, unit: str, what: str) -> None:
        like = self._arrays(part, unit)
        if found.keys() != like.keys():
            raise ProtocolError(
                f"{what}: arrays {[one[:80] for one in sorted(found)[:5]]}, expected "
                f"{sorted(like)[:5]} ({len(found)} and {len(like)}): do both hosts use the same "
                "model and version?"
            )
        for path, array in found.items():
            one = like[path]
            if array.shape != one.shape or array.dtype.kind != one.kind:
                raise ProtocolError(
                    f"{what}/{path} as {array.dtype}{list(array.shape)}, expected {one.kind!r} "
                    f"numbers {list(one.shape)}: do both hosts use the same model?"
                )

    def _arrays(self, part: str, unit: str) -> dict[str, _Like]:
        """Returns what arrays a unit has of a part, by path or by number."""
        key = part, unit
        if key not in self._known:
            one = self._units[unit]
            if part in ("params", "state"):
                values: Mapping[str, PyTree] = one.params if part == "params" else one.state
            else:
                init = self._tx.init if part == "opt" else self._rule.init
                tree = jax.eval_shape(init, dict(one.params))
                if not isinstance(tree, Mapping):
                    tree = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
                values = tree
            self._known[key] = {
                path: _Like(
                    tuple(leaf.shape), np.dtype(leaf.dtype).kind,
                    int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
                )
                for path, leaf in values.items()
            }  # fmt: skip
        return self._known[key]

    def _moved(self, old: Plan, new: Plan, host: str, *, leaves: bool) -> Wanted:
        """Returns the optimiser states that leave a host, or come to it."""
        found: dict[str, list[str]] = {}
        for one in moves(old, new, len(self.names)):
            if (one.source if leaves else one.target) == host:
                found.setdefault(str(one.copy), []).append(self.names[one.unit])
        return {copy: {"opt": tuple(units)} for copy, units in found.items()}


def _rows(plan: Plan, host: str, spans: Sequence[Span]) -> int:
    """Returns the most actions of a host in a round."""
    found = 0
    for span in spans:
        one = plan.devices[span.device]
        own = sum(plan.host(span.device, stage) == host for stage in range(one.stages))
        if own:
            found += (span.stop - span.first) * (own * (8 * one.micro_batches + 2) + 4)
    return found


def _summary(wanted: Wanted) -> str:
    """Returns what is wanted in a few words."""
    text = ", ".join(
        f"{group}/{part} of {len(units)} units"
        for group, parts in wanted.items()
        for part, units in parts.items()
        if units
    )
    return text[:300] or "nothing"


def odd_seen(said: LookSeen, plan: Plan, host: str) -> str | None:
    """Returns what a host says it saw that is not its own under a plan, or None."""
    for row in said.rows:
        of = range(len(plan.devices)) if row.device == ALL else (row.device,)
        own = any(
            device < len(plan.devices)
            and row.stage < plan.devices[device].stages
            and plan.host(device, row.stage) == host
            for device in of
        )
        if not own:
            return f"{tuple(row)}, which is no computation of its own under the plan"
    for boundary, _ in said.direct:
        if host not in boundary[:2]:
            return f"the link for {tuple(boundary)}, which is none of its own"
    return None


def unpacked(message: Message, peer: str) -> dict[str, PyTree]:
    """Returns a bundle's arrays by group, part and unit.

    Raises:
      ProtocolError: They are coded wrongly, or have other names.
    """
    try:
        return weight_bundle.unpack(message.tensors, peer)
    except (ChannelError, RunError) as error:
        raise ProtocolError(f"{peer} sent {message.name!r} that cannot be read: {error}") from error


def read_rows(
    message: Message, plans: Sequence[Plan], host: str, steps: Sequence[int], peer: str
) -> list[Any]:
    """Returns the timed actions of a bundle, which are all the sender's own.

    Args:
      message: What arrived.
      plans: The plans under which they may have happened.
      host: The sender.
      steps: Steps of each device in the whole run.
      peer: The sender in words.

    Raises:
      ProtocolError: They are none, or another host's.
    """
    what = f"{peer} sent {message.name!r}"
    try:
        tensors = message.tensors
    except ChannelError as error:
        raise ProtocolError(f"{what} that cannot be read: {error}") from error
    numbers, times = tensors.get("numbers"), tensors.get("times")
    shaped = (
        len(tensors) == 2 and numbers is not None and times is not None
        and numbers.ndim == times.ndim == 2 and len(numbers) == len(times)
        and numbers.shape[1] == 7 and times.shape[1] == 2
        and numbers.dtype == np.int64 and times.dtype == np.float64
    )  # fmt: skip
    if not shaped or numbers is None or times is None:
        found = {name[:40]: f"{one.dtype}{list(one.shape)}" for name, one in tensors.items()}
        raise ProtocolError(
            f"{what} with {str(found)[:200]}, expected numbers int64[rows, 7] and times "
            "float64[rows, 2]"
        )
    if len(numbers) and (odd := _odd_row(numbers, times, plans, host, steps)) is not None:
        raise ProtocolError(
            f"{what} with row {odd}: {numbers[odd].tolist()}, {times[odd].tolist()}, which is no "
            "action of its own under the plan"
        )
    return weight_bundle.unpack_rows(tensors, peer)


def _odd_row(
    numbers: Array,
    times: Array,
    plans: Sequence[Plan],
    host: str,
    steps: Sequence[int],
) -> int | None:
    """Returns the first row that is no action of a host, or None."""
    devices = len(steps)
    stages = max(one.stages for plan in plans for one in plan.devices)
    own = np.zeros((devices + 1, stages), bool)  # the last row is that of ALL
    for plan in plans:
        for device, one in enumerate(plan.devices):
            for stage in range(one.stages):
                own[device, stage] |= plan.host(device, stage) == host
    own[ALL] = own[:-1].any(axis=0)
    stage, kind, device, step, micro, nbytes, samples = numbers.T
    fits = (stage >= 0) & (stage < stages) & (kind >= 0) & (kind < len(_KINDS))
    fits &= (device >= ALL) & (device < devices) & (step >= 0) & (step < max(steps))
    fits &= (micro >= 0) & (nbytes >= 0) & (samples >= 0) & (numbers < 2**53).all(axis=1)
    # Of clocks: what is beyond their seconds would leave the range of floats in a trace.
    fits &= (np.abs(times) <= MOST_S).all(axis=1) & (times[:, 0] <= times[:, 1])
    if fits.all():
        # Weights and device parts are noted under stage 0 and the sender's own number.
        bound = np.isin(kind, [i for i, one in enumerate(_KINDS) if one in COMPUTE or
                               one in weight_bundle.TENSOR_KINDS])  # fmt: skip
        fits &= ~bound | own[device, stage]
        fits &= kind != _KINDS.index(EVALUATE)
    return None if fits.all() else int(np.argmin(fits))
