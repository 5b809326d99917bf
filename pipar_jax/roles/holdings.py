"""Which bundles are valid: the weights, statistics and states of the units their sender holds.

A bundle is a set of named arrays. Its contents follow from the plan, the sender and what was
requested: groups of arrays, of given units, with given paths, shapes and dtypes. A host cannot
overwrite another host's state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from comms import Allowance, ChannelError, Message, MessageKind
from comms.arrays import Array, DType
from pipar_jax.aggregation.rules import make_rule
from pipar_jax.config import Config
from pipar_jax.errors import ProtocolError
from pipar_jax.protocol.messages import LookSeen
from pipar_jax.protocol.registry import peek
from pipar_jax.protocol.values import MOST_S, Part
from pipar_jax.runtime import exchanges, trace_rows, unit_state
from pipar_jax.runtime.unit_state import States, UnitState, Wanted
from pipar_jax.schedule.actions import (
    ALL,
    COMPUTE,
    EVALUATE,
    UPDATE,
    ActionKind,
    Span,
    batch_samples,
    micro_batch_sizes,
)
from pipar_jax.schedule.plan import DevicePlan, Order, Plan, host_index, is_node
from pipar_jax.training import optimizer
from stages import Model

_KINDS = trace_rows.ROW_KINDS
#: What hosts may send before there is a plan: the bytes that a link is timed with.
SURVEYED = Allowance(tensor_bytes=0, bundle_bytes=33 << 20, bundle_tensors=1)
_ROW_BYTES = 7 * 8 + 2 * 8


class Like(NamedTuple):
    """The required dtype and shape of an array."""

    shape: tuple[int, ...]
    dtype: DType
    nbytes: int


class Holdings:
    """The contents of bundles of a model's state.

    Attributes:
      names: The model's units in order.

    Args:
      model: The whole model.
      config: Resolved configuration: its optimiser and its rule of aggregation.
    """

    def __init__(self, model: Model, config: Config) -> None:
        self.names = model.unit_names
        self._tx = optimizer.build(
            config.optimizer, steps=optimizer.MANY_STEPS, proximal_mu=config.aggregation.proximal_mu
        )
        self._pulls_optimizers = config.checkpoint.device_state == "server"
        self._copies_nodes = config.nodes.replicate_every > 0
        self._rule = make_rule(config.aggregation).transformation
        self._units = {unit.name: unit for unit in model.units}
        self._likes: dict[tuple[str, str], dict[str, Like]] = {}

    def arrays(self, wanted: Wanted) -> dict[str, Like]:
        """Returns the required arrays by their names in a bundle."""
        return {
            unit_state.tensor_name(key, part, path): like
            for key, parts in wanted.items()
            for part in parts
            for path, like in self._like(part, key[1]).items()
        }

    def nbytes(self, wanted: Wanted) -> int:
        """Returns the bytes of a bundle's required arrays."""
        return sum(one.nbytes for one in self.arrays(wanted).values())

    def count(self, wanted: Wanted) -> int:
        """Returns the number of a bundle's required arrays."""
        return len(self.arrays(wanted))

    def allowance(
        self,
        plans: Sequence[Plan],
        host: str,
        rounds: Sequence[Sequence[Span]],
        tensor_bytes: int,
    ) -> Allowance:
        """Returns how much a host may send: its largest bundle and a small margin.

        Args:
          plans: The plan in force, and the next plan during a change.
          host: The host's name.
          rounds: The run's rounds.
          tensor_bytes: Bytes of its largest tensor outside bundles.
        """
        plan = plans[-1]
        pulled = exchanges.kept(plan, host, self.names, rule=True)
        if self._pulls_optimizers or (self._copies_nodes and is_node(host)):
            states = exchanges.optimizer_states(plan, host, self.names)
            pulled = exchanges.joined(pulled, states)
        bundles = [exchanges.trained(plan, host, self.names), pulled]
        if plan.order == Order.SEQUENTIAL and not is_node(host):
            bundles.append(exchanges.client_model(plan, host_index(host), self.names))
        if len(plans) > 1:
            bundles.append(exchanges.leaving(plans[0], plan, host, self.names))
        rows = 2 * max(_rows(one, host, spans) for one in plans for spans in rounds) + 1024
        return self.room(bundles, tensor_bytes, rows * _ROW_BYTES)

    def room(self, bundles: Sequence[Wanted], tensor_bytes: int, least_bytes: int = 0) -> Allowance:
        """Returns the allowance for some bundles, of at least ``least_bytes``."""
        largest = max(self.nbytes(one) for one in bundles)
        tensors = max(self.count(one) for one in bundles)
        return Allowance(
            tensor_bytes=tensor_bytes,
            # Codecs may make a small array larger.
            bundle_bytes=max(largest + largest // 8 + 1024 * tensors, least_bytes),
            bundle_tensors=max(tensors, 2),
        )

    def states(self, message: Message, wanted: Wanted, peer: str) -> States:
        """Returns the states of units in a message, which are exactly the requested states.

        Args:
          message: The received message.
          wanted: The requested states.
          peer: The sender, in words.

        Raises:
          ProtocolError: The contents differ from the request.
        """
        name = known.name if (known := peek(message)) else ""
        needed = self.arrays(wanted)
        if needed and message.kind != MessageKind.BUNDLE:
            raise ProtocolError(
                f"{peer} sent {name!r} without its {len(needed)} arrays of {_summary(wanted)}"
            )
        tensors = unpacked(message, peer) if message.kind == MessageKind.BUNDLE else {}
        if odd := next((one for one in tensors if one not in needed), None):
            raise ProtocolError(
                f"{peer} sent {name!r} with {odd[:80]!r}, which the plan has not for it (expected "
                f"of it: {_summary(wanted)})"
            )
        for path, like in needed.items():
            array = tensors.get(path)
            # Codecs give back the dtype that they were given. Averages rely on equal ones.
            if array is None or array.shape != like.shape or array.dtype != like.dtype:
                what = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise ProtocolError(
                    f"{peer} sent {name!r} with {what} as {path}, expected "
                    f"{like.dtype}{list(like.shape)}: do both hosts use the same model and version?"
                )
        return {
            key: UnitState(
                **{
                    part: {
                        path: tensors[unit_state.tensor_name(key, part, path)]
                        for path in self._like(part, key[1])
                    }
                    for part in parts
                }
            )
            for key, parts in wanted.items()
        }

    def _like(self, part: Part, unit: str) -> dict[str, Like]:
        """Returns the arrays of a part of a unit, by path or by number."""
        if (part, unit) not in self._likes:
            one = self._units[unit]
            values: Any = one.shared if part == "params" else one.state
            if part == "opt":
                values = jax.eval_shape(self._tx.init, dict(one.params))
            elif part == "rule":
                values = jax.eval_shape(self._rule.init, dict(one.shared))
            self._likes[part, unit] = {
                path: Like(
                    tuple(leaf.shape), np.dtype(leaf.dtype),
                    int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
                )
                for path, leaf in unit_state.leaves(part, values).items()
            }  # fmt: skip
        return self._likes[part, unit]


def _rows(plan: Plan, host: str, spans: Sequence[Span]) -> int:
    """Returns the largest number of a host's actions in a round."""
    found = 0
    for span in spans:
        one = plan.devices[span.device]
        own = sum(plan.host(span.device, stage) == host for stage in range(one.stages))
        if own:
            found += (span.stop - span.first) * (own * (8 * one.micro_batches + 2) + 4)
    return found


def _summary(wanted: Wanted) -> str:
    """Returns a short description of a request."""
    counts = Counter((copy, part) for (copy, _), parts in wanted.items() for part in parts)
    text = ", ".join(f"{copy}/{part} of {n} units" for (copy, part), n in counts.items())
    return text[:300] or "nothing"


def odd_seen(
    said: LookSeen, plan: Plan, host: str, samples: Sequence[int], batch_size: int
) -> str | None:
    """Returns an observation that a host reported but that is not its own, or None.

    So there are no more of them than computations that differ: whoever learns from them keeps
    something of each.

    Args:
      said: What it has observed.
      plan: The plan in force.
      host: The host.
      samples: Samples of an epoch of each device.
      batch_size: Samples of a full mini-batch.
    """
    told = set()
    for row in said.rows:
        of = range(len(plan.devices)) if row.device == ALL else (row.device,)
        own = any(
            device < len(plan.devices)
            and row.stage < plan.devices[device].stages
            and plan.host(device, row.stage) == host
            and row.samples in _sizes(row.kind, samples[device], batch_size, plan.devices[device])
            for device in of
        )
        if not own:
            return f"{tuple(row)}, which is not one of its computations under the plan"
        if row[:4] in told:
            return f"{tuple(row)}, of which it has told already"
        told.add(row[:4])
    boundaries = [boundary for boundary, _ in said.direct]
    for boundary in boundaries:
        if host not in boundary[:2]:
            return f"the link for {tuple(boundary)}, which is not one of its links"
    if len(set(boundaries)) < len(boundaries):
        return "a link of which it tells twice"
    return None


def _sizes(kind: ActionKind, samples: int, batch_size: int, chain: DevicePlan) -> tuple[int, ...]:
    """Returns what numbers of samples a computation of a device may be of."""
    if kind == UPDATE:
        return (0,)
    batches = {batch_samples(samples, batch_size, step) for step in (0, samples // batch_size)}
    return tuple(
        size for batch in batches for size in micro_batch_sizes(batch, chain.micro_batches)
    )


def unpacked(message: Message, peer: str) -> Mapping[str, Array]:
    """Returns a bundle's arrays.

    Raises:
      ProtocolError: They cannot be decoded.
    """
    try:
        return message.tensors
    except ChannelError as error:
        raise ProtocolError(f"{peer} sent {message.name!r} that cannot be read: {error}") from error


def read_rows(
    message: Message, plans: Sequence[Plan], host: str, steps: Sequence[int], peer: str
) -> list[Any]:
    """Returns the timed actions of a bundle, all of them the sender's own.

    Args:
      message: What arrived.
      plans: The plans under which they may have happened.
      host: The sender.
      steps: Steps of each device in the whole run.
      peer: The sender in words.

    Raises:
      ProtocolError: They are not valid actions, or another host's.
    """
    what = f"{peer} sent {message.name!r}"
    tensors = unpacked(message, peer)
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
            f"{what} with row {odd}: {numbers[odd].tolist()}, {times[odd].tolist()}, which is not "
            "one of its actions under the plan"
        )
    return trace_rows.unpack_rows(tensors, peer)


def _odd_row(
    numbers: Array,
    times: Array,
    plans: Sequence[Plan],
    host: str,
    steps: Sequence[int],
) -> int | None:
    """Returns the first row that is not an action of a host, or None."""
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
                               one in trace_rows.TENSOR_KINDS])  # fmt: skip
        fits &= ~bound | own[device, stage]
        fits &= kind != _KINDS.index(EVALUATE)
    return None if fits.all() else int(np.argmin(fits))
