"""The last mini-batch of an epoch, if it is not full: computed in the shapes of a full one.

Its micro-batches are filled up with copies of their first sample, whose losses do not count, so
that no gradient comes of them either. That changes nothing but rounding where each sample is
computed by itself. It is known of our own layers without batch statistics; stages of other networks
are tried on random numbers once they are compiled. Where it is not so, in private runs, and where
devices may come and go, whose replay must not depend on who was there first, the stages are
compiled for the smaller sizes as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

from comms.arrays import Array
from pipar_jax.schedule.host_program import HostProgram
from pipar_jax.training.apart import computes_apart
from pipar_jax.training.compile import units_of
from pipar_jax.training.replica import Replica
from stages import Model

#: Whether a stage, from its first unit to its last, computes each sample by itself.
Apart: TypeAlias = dict[tuple[str, str], bool]


class MicroBatchSizes:
    """The sizes of a host's micro-batches, and those in which they are computed.

    Attributes:
      all: The numbers of samples.
      fills: Whether the smaller ones of a last mini-batch are filled up.

    Args:
      model: The whole model.
      program: The host's program.
      samples: Samples of an epoch by place.
      batch_size: Samples in a full mini-batch.
      exact: Whether each sample counts alike in it, and its devices are those it began with.
      known: What is known of stages, to which ``confirm`` adds.
    """

    def __init__(
        self,
        model: Model,
        program: HostProgram,
        samples: Sequence[int],
        batch_size: int,
        *,
        exact: bool,
        known: Apart,
    ) -> None:
        self._model, self._known = model, known
        self.all = program.sizes(samples, batch_size)
        self._full = program.sizes(samples, batch_size, ragged=False)
        count = len(model.units)
        held = program.plan.held_units(program.host, count)
        self._ours = all(model.units[index].is_ours for index in held)
        self.fills = (
            exact
            and self._full != self.all
            and not any(model.units[index].state for index in held)
            and (self._ours or _by_sample(model, held, max(self._full)))
        )
        names = model.unit_names
        self._stages = {
            (names[units[0]], names[units[-1]])
            for place, device in enumerate(program.plan.devices)
            for stage in range(device.stages)
            if program.plan.host(place, stage) == program.host
            for units in [program.plan.units(place, stage, count)]
        }
        if not self._ours and not all(known.get(one, True) for one in self._stages):
            self.fills = False

    @property
    def computed(self) -> set[int]:
        """The sizes that are compiled."""
        return self._full if self.fills else self.all

    def confirm(self, replicas: Iterable[Replica]) -> bool:
        """Tries stages of others' layers, which are compiled, and returns whether nothing changes.

        Otherwise smaller sizes are not filled up from here on, and have to be compiled.
        """
        if not self.fills or self._ours:
            return True
        for replica in replicas:
            stage = units_of(replica)
            if stage not in self._known:
                self._known[stage] = computes_apart(self._model, replica, self._full)
            self.fills = self.fills and self._known[stage]
        return self.fills

    def settle(self) -> None:
        """Fills nothing up where a stage has not been tried."""
        self.fills = self.fills and (self._ours or self._stages <= self._known.keys())

    def of(self, samples: int) -> int:
        """Returns the size in which a micro-batch of some samples is computed."""
        if not self.fills or samples in self.computed:
            return samples
        return min((size for size in self.computed if size >= samples), default=samples)

    def told(self, replicas: Iterable[Replica]) -> None:
        """Lets the replicas count the samples of their micro-batches, if any is filled up."""
        for replica in replicas:
            replica.counts = self.fills


def _by_sample(model: Model, held: Iterable[int], samples: int) -> bool:
    """Returns whether the first axis of all that enters and leaves some units is of samples."""
    few, many = model.shapes(1), model.shapes(samples)
    return all(
        few[cut].shape[:1] == (1,) and many[cut].shape == (samples, *few[cut].shape[1:])
        for unit in held
        for cut in (unit, unit + 1)
    )


def filled(array: Array, rows: int) -> Array:
    """Returns an array [samples, …] filled up with copies of its first sample."""
    missing = rows - len(array)
    return np.concatenate([array, np.repeat(array[:1], missing, axis=0)]) if missing else array


def filler(samples: int, rows: int, *, zeros: bool) -> Callable[[Array], Array] | None:
    """Returns what fills an array [samples, …] up, or None if it is full.

    Args:
      samples: Its samples.
      rows: In how many it is computed with.
      zeros: Whether with zeros (a cotangent), and not with copies of its first sample.
    """
    if rows == samples:
        return None
    return functools.partial(_filled_with_zeros if zeros else filled, rows=rows)


def _filled_with_zeros(array: Array, rows: int) -> Array:
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
