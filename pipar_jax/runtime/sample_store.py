"""Inputs, side inputs and targets of micro-batches on a host: its own, or those that arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from comms import Message, Role, Tag
from comms.arrays import Array
from pipar_jax.data.loader import Batch
from pipar_jax.data.types import computed
from pipar_jax.runtime.memory import Ledger
from pipar_jax.runtime.ragged import filled
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import ALL, NO_ATTEMPT, Action
from pipar_jax.schedule.host_program import Beside, HostProgram, find_beside
from stages import Model
from stages.signature import TARGET, unwrapped
from stages.trees import Targets


class Batches(Protocol):
    """A source of a device's mini-batches, such as ``pipar_jax.data.Prefetcher``."""

    def get(self, step: int) -> Batch:
        """Returns the mini-batch of a step."""


class MicroBatchSlice(NamedTuple):
    """A micro-batch's position in its mini-batch.

    Attributes:
      before: Samples before it.
      samples: Samples in it.
      parts: Micro-batches in the mini-batch.
      batch_samples: Samples in the mini-batch.
    """

    before: int
    samples: int
    parts: int
    batch_samples: int


class BesideTensor(NamedTuple):
    """An array that leaves beside an activation.

    Attributes:
      role: LABEL or SIDE.
      entry: Index of its name among the model's targets or side inputs.
      array: The array [micro-batch, …].
    """

    role: Role
    entry: int
    array: Array


class SampleStore:
    """What the micro-batches of a host consist of, beside activations.

    The host with the data slices its mini-batches; every other host keeps what arrived until it has
    been used and sent on. Owned by the host's dispatch thread.

    Args:
      program: The host's program under the run's plan.
      model: The whole model.
      batches: The device's data, if this host is a device.
      ledger: Counts the bytes of what arrived.
      dtype: The dtype that numbers with a fraction are computed in.
      lengths: Is told to what the device's own mini-batches are padded.
      computed_size: Returns in what size a micro-batch of some samples is computed.

    Attributes:
      attempt: Number of the attempt at the round.
    """

    def __init__(
        self,
        program: HostProgram,
        model: Model,
        batches: Batches | None,
        ledger: Ledger,
        dtype: DTypeLike,
        lengths: StepLengths,
        computed_size: Callable[[int], int],
    ) -> None:
        self._computed_size = computed_size
        self._program, self._batches, self._ledger = program, batches, ledger
        self._dtype, self._lengths, self.attempt = np.dtype(dtype), lengths, NO_ATTEMPT
        self._unit_sides = [unit.sides for unit in model.units]
        self._sides = sorted(model.sides)
        self._targets = sorted(model.targets or (TARGET,))
        self._beside: dict[tuple[int, int], Beside] = {}
        self._mini_batches: dict[tuple[int, int], Batch] = {}
        self._arrived: dict[tuple[int, int, int], dict[tuple[Role, str], Array]] = {}

    def __len__(self) -> int:
        """Returns the number of micro-batches of which something has arrived and is kept."""
        return len(self._arrived)

    def beside(self, place: int, below: int) -> Beside:
        """Returns what crosses the boundary above a place's stage beside the activation."""
        if (place, below) not in self._beside:
            plan = self._program.plan
            self._beside[place, below] = find_beside(plan, place, below, self._unit_sides)
        return self._beside[place, below]

    def receive(self, message: Message, tag: Tag) -> None:
        """Keeps a copy of an array, which may be needed longer than its buffer should live."""
        names = self._targets if tag.role == Role.LABEL else self._sides
        array = np.array(message.array)
        kept = self._arrived.setdefault((tag.device, tag.step, tag.micro_batch), {})
        kept[tag.role, names[tag.entry]] = array
        self._ledger.hold(array.nbytes)
        message.release()

    def is_complete(self, action: Action) -> bool:
        """Returns whether all has arrived that comes beside the activation of a receive."""
        beside = self.beside(action.device, action.stage - 1)
        expected = len(beside.sides) + (len(self._targets) if beside.targets else 0)
        kept = self._arrived.get((action.device, action.step, action.micro_batch), {})
        return len(kept) == expected

    def x(self, action: Action, part: MicroBatchSlice) -> jax.Array:
        """Returns the input of a micro-batch of this device."""
        rows = _slice(self._mini_batch(action).x, part)
        x: jax.Array = jax.device_put(filled(rows, self._computed_size(part.samples)))
        return x

    def sides(
        self, action: Action, part: MicroBatchSlice, names: tuple[str, ...]
    ) -> dict[str, jax.Array]:
        """Returns side inputs of a micro-batch."""
        return {name: self._placed(Role.SIDE, name, action, part) for name in names}

    def targets(self, action: Action, part: MicroBatchSlice) -> Targets:
        """Returns the targets of a micro-batch, as the loss gets them."""
        return unwrapped(
            {name: self._placed(Role.LABEL, name, action, part) for name in self._targets}
        )

    def _placed(self, role: Role, name: str, action: Action, part: MicroBatchSlice) -> jax.Array:
        rows = filled(self._of(role, name, action, part), self._computed_size(part.samples))
        placed: jax.Array = jax.device_put(rows)
        return placed

    def outgoing(self, action: Action, part: MicroBatchSlice) -> list[BesideTensor]:
        """Returns what leaves beside the activation of an action, in the order of its sending."""
        beside = self.beside(action.device, action.stage)
        wanted: tuple[tuple[Role, list[str], Sequence[str]], ...] = (
            (Role.LABEL, self._targets, self._targets if beside.targets else ()),
            (Role.SIDE, self._sides, beside.sides),
        )
        return [
            BesideTensor(role, known.index(name), self._of(role, name, action, part))
            for role, known, names in wanted
            for name in names
        ]

    def drop(self, action: Action) -> None:
        """Releases what arrived of a micro-batch."""
        for array in self._arrived.pop(
            (action.device, action.step, action.micro_batch), {}
        ).values():
            self._ledger.drop(array.nbytes)

    def step_over(self, device: int, step: int) -> None:
        """Releases a device's own mini-batch."""
        self._mini_batches.pop((device, step), None)

    def forget(self, place: int) -> None:
        """Releases everything of a place, or with ``ALL`` of all places."""
        for key in [key for key in self._arrived if place in (ALL, key[0])]:
            for array in self._arrived.pop(key).values():
                self._ledger.drop(array.nbytes)
        for own in [key for key in self._mini_batches if place in (ALL, key[0])]:
            del self._mini_batches[own]

    def _of(self, role: Role, name: str, action: Action, part: MicroBatchSlice) -> Array:
        """Returns an array of a micro-batch: the device's own, or that which arrived."""
        if self._batches is not None and self._program.is_first(action.device):
            batch = self._mini_batch(action)
            return _slice((batch.targets if role == Role.LABEL else batch.sides)[name], part)
        return self._arrived[action.device, action.step, action.micro_batch][role, name]

    def _mini_batch(self, action: Action) -> Batch:
        """Returns the device's samples of a step, in the dtypes of the computation."""
        key = action.device, action.step
        if key not in self._mini_batches:
            assert self._batches is not None, f"{self._program.host} has no data for {action}"
            x, sides, targets = self._batches.get(action.step)
            self._mini_batches[key] = Batch(
                computed(x, self._dtype),
                {name: computed(one, self._dtype) for name, one in sides.items()},
                {name: computed(one, self._dtype) for name, one in targets.items()},
            )
        batch = self._mini_batches[key]
        self._lengths.note(self.attempt, *key, batch.x.shape[1:2])
        return batch


def _slice(array: Array, part: MicroBatchSlice) -> Array:
    """Returns a micro-batch of a mini-batch's array; nothing is copied."""
    some: Array = array[part.before : part.before + part.samples]
    return some
