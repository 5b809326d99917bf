"""The last mini-batch of an epoch, if it is not full: computed in the shapes of a full one.

Its micro-batches are filled up with copies of their first sample, whose losses do not count, so
that no gradient comes of them either. That changes nothing but rounding where each sample is
computed by itself, which is known of our own layers without batch statistics; for other networks,
in private runs, and where devices may come and go, whose replay must not depend on who was there
first, the stages are compiled for the smaller sizes as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from comms.arrays import Array
from pipar_jax.schedule.host_program import HostProgram
from pipar_jax.training.replica import Replica
from stages import Model


class MicroBatchSizes:
    """The sizes of a host's micro-batches, and those in which they are computed.

    Attributes:
      all: The numbers of samples.
      computed: The sizes that are compiled.
      fills: Whether the smaller ones of a last mini-batch are filled up.

    Args:
      model: The whole model.
      program: The host's program.
      samples: Samples of an epoch by place.
      batch_size: Samples in a full mini-batch.
      exact: Whether each sample counts alike in it, and its devices are those it began with.
    """

    def __init__(
        self,
        model: Model,
        program: HostProgram,
        samples: Sequence[int],
        batch_size: int,
        *,
        exact: bool,
    ) -> None:
        self.all = program.sizes(samples, batch_size)
        full = program.sizes(samples, batch_size, ragged=False)
        held = [model.units[index] for index in program.plan.held_units(
            program.host, len(model.units))]  # fmt: skip
        apart = all(unit.is_ours and not unit.state for unit in held)
        self.fills = full != self.all and apart and exact
        self.computed = full if self.fills else self.all

    def of(self, samples: int) -> int:
        """Returns the size in which a micro-batch of some samples is computed."""
        if not self.fills or samples in self.computed:
            return samples
        return min((size for size in self.computed if size >= samples), default=samples)

    def told(self, replicas: Iterable[Replica]) -> None:
        """Lets the replicas count the samples of their micro-batches, if any is filled up."""
        for replica in replicas:
            replica.counts = self.fills


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
