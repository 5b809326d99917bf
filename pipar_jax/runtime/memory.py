"""Memory of a host: what its share of a plan needs, and what it really held at most.

A node that serves K devices, with weights W (their optimiser state and gradients beside them) and
what a mini-batch's forward keeps, A, needs K(3W + A) with a copy for each device, 3W + KA with
shared weights, and 3W + cA with at most c micro-batches in flight (Tirana et al., arXiv
2402.00208, and ours). To these come what averaging keeps, tensors that wait, and XLA's
temporaries. Weights in flight between hosts, what evaluation fetches, and what preparing and making
a change of plan takes meanwhile are not counted.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import stages
from pipar_jax.aggregation import rules
from pipar_jax.config import Config
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.schedule.actions import ALL, batch_samples, micro_batch_sizes
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.plan import Plan, is_node, long_name
from pipar_jax.training import optimizer
from pipar_jax.training.replica import Replica, abstract
from stages import Model, Stage, make_draw


class Ledger:
    """Bytes of the arrays that come and go on a host, now and at most; any thread may book."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._lock = threading.Lock()
        self._now = self._peak = 0

    @property
    def now_bytes(self) -> int:
        """Bytes held now."""
        return self._now

    def hold(self, nbytes: int) -> None:
        """Books bytes in; a negative number books them out."""
        with self._lock:
            self._now += nbytes
            self._peak = max(self._peak, self._now)

    def drop(self, nbytes: int) -> None:
        """Books bytes out."""
        self.hold(-nbytes)

    def take_peak(self) -> int:
        """Returns the most bytes held since the last call."""
        with self._lock:
            peak, self._peak = self._peak, self._now
        return peak


class Need(NamedTuple):
    """What a host's share of a plan needs, in bytes, at its worst moment.

    Attributes:
      variables: Weights, batch statistics, optimiser states and gradients of all replicas.
      copies: How many replicas its largest stage has.
      average: What averaging on a compute node keeps between rounds.
      held: What forwards keep for their backwards, of all micro-batches that may be between them.
      waiting: Tensors that have arrived and wait, and results of what is being computed.
    """

    variables: int
    copies: int
    average: int
    held: int
    waiting: int

    @property
    def arrays(self) -> int:
        """Bytes of all arrays, XLA's temporaries left out."""
        return self.variables + self.average + self.held + self.waiting


class Used(NamedTuple):
    """What a host really held, in bytes.

    Attributes:
      arrays: The most bytes of arrays at a time.
      temporary: The largest of its compiled functions' temporaries.
      resident: The most memory that its process had in use so far, other hosts' in it included.
    """

    arrays: int
    temporary: int
    resident: int

    @property
    def total(self) -> int:
        """Bytes of arrays and temporaries."""
        return self.arrays + self.temporary


class _Passing(NamedTuple):
    """What one micro-batch of a stage occupies at its different moments, in bytes.

    Attributes:
      below: Host of the stage below.
      above: Host of the stage above.
      x: Its input, if it came from another stage, and the cotangent that goes back.
      kept: What its forward keeps for its backward; nothing at a last stage.
      y: Its result, and the cotangent that comes back; nothing at a last stage.
    """

    below: str
    above: str
    x: int
    kept: int
    y: int


def predict(model: Model, plan: Plan, host: str, config: Config, samples: Sequence[int]) -> Need:
    """Returns what a host needs, from shapes alone: nothing is computed or compiled.

    The worst moment is taken: every micro-batch that may be between its forward and its backward
    is, and the cotangents of as many as links let through have arrived.

    Args:
      model: The whole model.
      plan: The plan.
      host: The host's name.
      config: Optimiser, rule of aggregation, mini-batch, window of the links, and whether the
        host keeps residuals.
      samples: Samples that each device trains on in an epoch.
    """
    check_executable(plan)
    tx = optimizer.build(config.optimizer, steps=1, proximal_mu=config.aggregation.proximal_mu)
    rule = rules.rule(config.aggregation)
    window = int(config.pipeline.window_mb * 1e6)
    rematerialise = hosts_of(config)[host].rematerialise
    slots: dict[tuple[int, int], int] = {}
    # Where devices take turns, each one's micro-batches are there without the others'.
    passing: dict[tuple[int, int], list[_Passing]] = {}
    average = 0
    for device, one in enumerate(plan.devices):
        chain = [plan.host(device, stage) for stage in range(one.stages)]
        cut = stages.split(model, one.cuts, rematerialise=rematerialise)
        for index, stage in enumerate(cut):
            if chain[index] != host:
                continue
            units = [model.units[i] for i in plan.units(device, index, len(model.units))]
            params = {unit.name: unit.params for unit in units}
            state = {unit.name: unit.state for unit in units}
            slot = replica_key(plan, device, index)
            if slot not in slots:
                opt_state = [jax.eval_shape(tx.init, unit.params) for unit in units]
                slots[slot] = 2 * _bytes(params) + _bytes(state) + _bytes(opt_state)
                first = sum(1 for _, s in slots if s == index) == 1
                if first and index in plan.local_stages(host) and plan.weights == "copy":
                    rule_state = [jax.eval_shape(rule.init, unit.params) for unit in units]
                    average += _bytes(params) + _bytes(state) + _bytes(rule_state)
            if not samples[device]:
                continue
            group = passing.setdefault((index, device if plan.order == "sequential" else ALL), [])
            size = batch_samples(samples[device], config.data.batch_size, 0)
            for micro in micro_batch_sizes(size, one.micro_batches):
                x = model.shapes(micro)[plan.units(device, index, len(model.units)).start]
                sizes = _sizes(stage, params, state, x)
                group.append(_Passing(chain[index - 1], chain[(index + 1) % len(chain)], *sizes))
    worst: dict[int, tuple[int, int]] = {}
    for (index, _), found in passing.items():
        capped = plan.in_flight if plan.sums_gradients and plan.is_colocated(index) else 0
        worst[index] = max(worst.get(index, (0, 0)), _worst(found, capped, window), key=sum)
    held, waiting = (sum(column) for column in zip((0, 0), *worst.values(), strict=True))
    copies = max((sum(1 for _, s in slots if s == index) for _, index in slots), default=0)
    return Need(sum(slots.values()), copies, average, held, waiting)


def why_not_fit(model: Model, plan: Plan, config: Config, samples: Sequence[int]) -> str | None:
    """Returns why some compute node would refuse a plan before it has compiled anything, or None.

    Args:
      model: The whole model.
      plan: The plan.
      config: Resolved configuration.
      samples: Samples that each device trains on in an epoch.
    """
    hosts = hosts_of(config)
    for host in hosts.nodes:
        limit_mb = hosts[host].memory_mb
        if limit_mb and plan.held_units(host, len(model.units)):
            need = predict(model, plan, host, config, samples)
            if (reason := memory_excess(need, None, limit_mb, host, plan)) is not None:
                return reason
    return None


def check(need: Need, temporary: int | None, limit_mb: float, host: str, plan: Plan) -> None:
    """Refuses a plan that exceeds a compute node's memory limit; see ``memory_excess``.

    Raises:
      RunError: It needs more.
    """
    if (reason := memory_excess(need, temporary, limit_mb, host, plan)) is not None:
        raise RunError(reason)


def memory_excess(
    need: Need, temporary: int | None, limit_mb: float, host: str, plan: Plan
) -> str | None:
    """Returns why a compute node refuses a plan that needs more memory than it may take, or None.

    Args:
      need: What it needs.
      temporary: Bytes of XLA's temporaries; None before anything is compiled.
      limit_mb: What it may take; 0 for any.
      host: The host's name.
      plan: The plan.
    """
    total = need.arrays + (temporary or 0)
    if not (is_node(host) and limit_mb) or total <= limit_mb * 1e6:
        return None
    mb = {name: f"{nbytes / 1e6:.1f}" for name, nbytes in need._asdict().items()}
    temporaries = "" if temporary is None else f", {temporary / 1e6:.1f} for XLA's temporaries"
    return (
        f"{long_name(host)} needs {total / 1e6:.1f} MB for the plan {plan}, but may take "
        f"nodes.{host[1:]}.memory_mb={limit_mb:g}: {mb['variables']} for weights, optimiser states "
        f"and gradients (copies: {need.copies}), {mb['average']} for their average, {mb['held']} "
        f"kept between forward and backward, {mb['waiting']} for tensors that wait{temporaries}. "
        "Move pipeline.cuts or add nodes, set pipeline.weights=shared (and pipeline.in_flight), "
        "serve fewer devices, or raise the limit"
    )


def temporary_bytes(model: Model, replicas: Iterable[Replica], sizes: Iterable[int]) -> int:
    """Returns the largest temporary memory of a host's compiled functions, as XLA tells it.

    What ran before with the same shapes is not compiled again.

    Args:
      model: The whole model.
      replicas: The host's replicas.
      sizes: Micro-batch sizes.
    """
    most, sizes = 0, set(sizes)
    for replica in {one.stage.unit_names: one for one in replicas}.values():
        stage = replica.stage
        params, state = abstract(replica.params), abstract(replica.state)
        lowered: list[Any] = replica.lower_updates()
        start = model.unit_names.index(stage.unit_names[0])
        for size in sizes:
            x, draw = model.shapes(size)[start], make_draw(size)
            if stage.is_last:
                y = model.shapes(size)[-1]
                labels = jax.ShapeDtypeStruct(y.shape[:-1], np.dtype(np.int32))  # type: ignore
                lowered.append(stage.programs.loss.lower(params, state, x, labels, draw, params))
                continue
            y, residuals, _ = jax.eval_shape(stage.forward, params, state, x, draw)
            lowered.append(stage.programs.forward.lower(params, state, x, draw))
            lowered.append(stage.programs.backward.lower(params, residuals, y, params))
        for one in lowered:
            analysis = one.compile().memory_analysis()
            most = max(most, getattr(analysis, "temp_size_in_bytes", 0))
    return most


def resident_bytes() -> int:
    """Returns the most memory that this process has had in use, whatever for."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def array_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _worst(found: Sequence[_Passing], in_flight: int, window: int) -> tuple[int, int]:
    """Returns the bytes held and waiting at a stage's worst moment.

    Args:
      found: Its micro-batches.
      in_flight: How many may be between forward and backward; 0 for any.
      window: Credit of a link.
    """
    ordered = sorted(found, key=lambda one: one.kept + one.y, reverse=True)
    inside = [one for one in ordered if one.kept][: in_flight or None]
    outside = [one for one in ordered if not one.kept] or ordered[len(inside) :]
    held = sum(one.kept for one in inside)
    # One that is inside has a result to send or a cotangent that waits, each within a credit.
    waiting = _within(((one.above, one.y) for one in inside), 2 * window)
    waiting += _within(((one.below, one.x) for one in outside), window)
    # What the running computation and the one queued behind it give.
    return held, waiting + sum(sorted((one.x for one in found), reverse=True)[:2])


def _within(some: Iterable[tuple[str, int]], window: int) -> int:
    """Returns the bytes of tensors that wait at the ends of links, as far as credits allow."""
    by_link: dict[str, list[int]] = {}
    for peer, nbytes in some:
        by_link.setdefault(peer, []).append(nbytes)
    return sum(min(sum(sizes), max(window, *sizes)) for sizes in by_link.values())


def _sizes(stage: Stage, params: Any, state: Any, x: Any) -> tuple[int, int, int]:
    """Returns ``_Passing``'s bytes of a micro-batch."""
    if stage.is_last:
        return (0 if stage.is_first else _bytes(x)), 0, 0
    draw = make_draw(x.shape[0])
    y, residuals, _ = jax.eval_shape(stage.forward, params, state, x, draw)
    return (0 if stage.is_first else _bytes(x)), _bytes(residuals), _bytes(y)


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree of shapes; scalars of a draw are no arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
