"""The memory model: what a host's share of a plan needs at its worst moment.

A node that serves K devices, with weights W (in addition to them optimiser state and gradients) and
what a mini-batch's forward keeps, A, needs K(3W + A) with a copy for each device, 3W + KA with
shared weights, and 3W + cA with at most c micro-batches in flight (Tirana et al., arXiv
2402.00208, and ours). To these come what averaging keeps, tensors that wait, and
where devices may be lost second copies to go back to. Nodes refuse plans
by it, with the bytes of their compiled stages; the tuner searches by it, with those of a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from pipar_jax.schedule.actions import ALL, batch_samples, micro_batch_sizes
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import COORDINATOR, Plan


class Need(NamedTuple):
    """What a host's share of a plan needs, in bytes, at its worst moment.

    Attributes:
      variables: Weights, batch statistics, optimiser states and gradients of all replicas.
      copies: How many replicas its largest stage has.
      average: What averaging on a compute node keeps between rounds.
      kept: Second copies, to go back to when a device is lost.
      held: What forwards keep for their backwards, of all micro-batches that may be between them.
      waiting: Tensors that have arrived and wait, and results of what is being computed.
      computing: What a last stage keeps within its one computation, if ``Sizes`` knows it.
    """

    variables: int
    copies: int
    average: int
    kept: int
    held: int
    waiting: int
    computing: int

    @property
    def arrays(self) -> int:
        """Bytes of all arrays, XLA's temporaries left out."""
        return self.variables + self.average + self.kept + self.held + self.waiting

    @property
    def total(self) -> int:
        """Bytes of all arrays, and of what a last stage keeps within its computation."""
        return self.arrays + self.computing


class StageSizes(NamedTuple):
    """What one micro-batch of a stage occupies at its different moments, in bytes.

    Attributes:
      x: Its input, if it came from another stage, and the cotangent that goes back.
      kept: What its forward keeps for its backward; nothing at a last stage.
      y: Its result, and the cotangent that comes back; nothing at a last stage.
      computing: What a last stage keeps between forward and backward, within one computation.
    """

    x: int
    kept: int
    y: int
    computing: int = 0


class Sizes(Protocol):
    """The bytes of a model's units."""

    @property
    def units(self) -> int:
        """How many units there are."""

    def replica(self, units: range) -> int:
        """Returns the bytes of a replica: weights, gradients, statistics and optimiser state."""

    def kept(self, units: range, keeps: Keep) -> int:
        """Returns the bytes of what a replica keeps of an earlier moment."""

    def average(self, units: range) -> int:
        """Returns the bytes that averaging keeps: weights, statistics and the rule's state."""

    def stage(self, units: range, samples: int) -> StageSizes:
        """Returns the bytes of a micro-batch in the stage of some units."""


class _Passing(NamedTuple):
    """One micro-batch of a stage.

    Attributes:
      below: Host of the stage below.
      above: Host of the stage above.
      sizes: What it occupies.
    """

    below: str
    above: str
    sizes: StageSizes


def find_need(
    sizes: Sizes,
    plan: Plan,
    host: str,
    samples: Sequence[int],
    batch: int,
    window: int,
    keeps: Callable[[int], Keep],
) -> Need:
    """Returns what a host needs for its share of a plan.

    The worst moment is taken: every micro-batch that may be between its forward and its backward
    is, and the cotangents of as many as links let through have arrived.

    Args:
      sizes: The bytes of the model's units.
      plan: The plan.
      host: The host's name.
      samples: Samples that each device trains on in an epoch.
      batch: Samples in a mini-batch.
      window: Credit of a link, in bytes.
      keeps: What a copy keeps of an earlier moment.
    """
    slots: dict[tuple[int, int], int] = {}
    # Where devices take turns, each one's micro-batches are there without the others'.
    passing: dict[tuple[int, int], list[_Passing]] = {}
    kept = 0
    average = sizes.average(range(sizes.units)) if host == COORDINATOR else 0
    for device, device_plan in enumerate(plan.devices):
        chain = [plan.host(device, stage) for stage in range(device_plan.stages)]
        for index, where in enumerate(chain):
            if where != host:
                continue
            units = plan.units(device, index, sizes.units)
            slot = replica_key(plan, device, index)
            if slot not in slots:
                slots[slot] = sizes.replica(units)
                kept += sizes.kept(units, keeps(slot[0]))
                first = sum(1 for _, s in slots if s == index) == 1
                if first and index in plan.local_stages(host) and plan.weights == "copy":
                    average += sizes.average(units)
            if not samples[device]:
                continue
            group = passing.setdefault((index, device if plan.order == "sequential" else ALL), [])
            size = batch_samples(samples[device], batch, 0)
            for micro in micro_batch_sizes(size, device_plan.micro_batches):
                below, above = chain[index - 1], chain[(index + 1) % len(chain)]
                group.append(_Passing(below, above, sizes.stage(units, micro)))
    worst: dict[int, tuple[int, int]] = {}
    for (index, _), batches in passing.items():
        capped = plan.in_flight if plan.sums_gradients and plan.is_colocated(index) else 0
        worst[index] = max(worst.get(index, (0, 0)), _worst(batches, capped, window), key=sum)
    held, waiting = (sum(column) for column in zip((0, 0), *worst.values(), strict=True))
    copies = max((sum(1 for _, s in slots if s == index) for _, index in slots), default=0)
    computing = max((p.sizes.computing for some in passing.values() for p in some), default=0)
    return Need(sum(slots.values()), copies, average, kept, held, waiting, computing)


def _worst(passing: Sequence[_Passing], in_flight: int, window: int) -> tuple[int, int]:
    """Returns the bytes held and waiting at a stage's worst moment.

    Args:
      passing: Its micro-batches.
      in_flight: How many may be between forward and backward; 0 for any.
      window: Credit of a link.
    """
    ordered = sorted(passing, key=lambda batch: batch.sizes.kept + batch.sizes.y, reverse=True)
    inside = [batch for batch in ordered if batch.sizes.kept][: in_flight or None]
    outside = [batch for batch in ordered if not batch.sizes.kept] or ordered[len(inside) :]
    held = sum(batch.sizes.kept for batch in inside)
    # One that is inside has a result to send or a cotangent that waits, each within a credit.
    waiting = _within(((batch.above, batch.sizes.y) for batch in inside), 2 * window)
    waiting += _within(((batch.below, batch.sizes.x) for batch in outside), window)
    # What the running computation and the one queued behind it give.
    return held, waiting + sum(sorted((batch.sizes.x for batch in passing), reverse=True)[:2])


def _within(some: Iterable[tuple[str, int]], window: int) -> int:
    """Returns the bytes of tensors that wait at the ends of links, as far as credits allow."""
    by_link: dict[str, list[int]] = {}
    for peer, nbytes in some:
        by_link.setdefault(peer, []).append(nbytes)
    return sum(min(sum(sizes), max(window, *sizes)) for sizes in by_link.values())
