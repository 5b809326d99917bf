"""Memory of a host: the predicted need of its share of a plan, and the measured peak.

``cost_model/memory.py`` has the model; here are the bytes of stages, from their shapes, and XLA's
temporaries. Weights in flight between hosts, evaluation, and the preparation and execution of
a change of plan are not counted.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import stages
from pipar_jax.aggregation import rules
from pipar_jax.config import AggregationConfig, Config, Hosts, OptimizerConfig
from pipar_jax.cost_model.memory import Need, StageSizes, find_need
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.runtime import moves, undo
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import COORDINATOR, Plan, is_device, is_node, long_name
from pipar_jax.training import optimizer
from pipar_jax.training.compile import trial_draw
from pipar_jax.training.replica import Replica, abstract
from stages import Model
from stages.trees import PyTree

#: Megabytes of a process that compiles: of jax and a model, and for each array of weights. Peaks of
#: cold starts were 0.84 to 1.14, and once 1.33, of these and three times the weights, in 14 stages.
PROCESS_MB, COMPILED_MB = 360.0, 6.0


class Ledger:
    """Present and peak bytes of a host's temporary arrays; any thread may call it."""

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


class Used(NamedTuple):
    """The measured memory of a host, in bytes.

    Attributes:
      arrays: Peak bytes of arrays.
      temporary: The largest temporary memory of its compiled functions.
      resident: Peak memory of its process so far, including other hosts in it.
    """

    arrays: int
    temporary: int
    resident: int

    @property
    def total(self) -> int:
        """Bytes of arrays and temporaries."""
        return self.arrays + self.temporary


def predict(model: Model, plan: Plan, host: str, config: Config, samples: Sequence[int]) -> Need:
    """Returns a host's need of memory, from shapes alone: nothing is computed or compiled.

    The worst case is assumed: every micro-batch that may be between its forward and its backward
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
    hosts = hosts_of(config)
    sizes = _ModelSizes(model, config.optimizer, config.aggregation, hosts[host].rematerialise)
    window = int(config.pipeline.window_mb * 1e6)
    keeps = functools.partial(undo.find_keep, hosts, config.cohort, plan)
    need = find_need(sizes, plan, host, samples, config.data.batch_size, window, keeps)
    if host == COORDINATOR and config.nodes.replicate_every:  # copies of what nodes alone have
        copied = [unit for (_, unit), where in moves.holders(plan, sizes.units).items()
                  if is_node(where)]  # fmt: skip
        copies = sum(sizes.kept(range(unit, unit + 1), Keep.OPTIMIZER) for unit in copied)
        need = need._replace(kept=need.kept + copies)
    held = [model.units[index] for index in plan.held_units(host, len(model.units))]
    frozen = tree_bytes([unit.frozen for unit in held])  # one copy
    # As they were after the last round.
    own = sum(unit.personal_bytes for unit in held) if is_device(host) else 0
    return need._replace(variables=need.variables + frozen, kept=need.kept + own)


class _ModelSizes:
    """The bytes of a model's units, from shapes alone; see ``cost_model.memory.Sizes``."""

    def __init__(
        self,
        model: Model,
        config: OptimizerConfig,
        aggregation: AggregationConfig,
        rematerialise: bool,
    ) -> None:
        self._model, self._rematerialise = model, rematerialise
        self._tx = optimizer.build(
            config, steps=optimizer.MANY_STEPS, proximal_mu=aggregation.proximal_mu
        )
        self._rule = rules.make_rule(aggregation).transformation
        self._stages: dict[tuple[range, int], StageSizes] = {}
        self.units = len(model.units)

    def replica(self, units: range) -> int:
        """Returns the bytes of weights, gradients, statistics and optimiser state."""
        params, state = self._variables(units)
        opt_state = [jax.eval_shape(self._tx.init, one) for one in params.values()]
        return 2 * tree_bytes(params) + tree_bytes(state) + tree_bytes(opt_state)

    def kept(self, units: range, keeps: Keep) -> int:
        """Returns the bytes of optimiser states, and of the rest where it is kept too."""
        params, state = self._variables(units)
        opt_state = tree_bytes([jax.eval_shape(self._tx.init, one) for one in params.values()])
        whole = tree_bytes(params) + tree_bytes(state) + opt_state
        return (opt_state if Keep.OPTIMIZER in keeps else 0) + keeps.wholes * whole

    def average(self, units: range) -> int:
        """Returns the bytes of weights, statistics and the rule's state."""
        _, state = self._variables(units)
        params = {unit.name: unit.shared for unit in self._model.units[units.start : units.stop]}
        rule_state = [jax.eval_shape(self._rule.init, one) for one in params.values()]
        return tree_bytes(params) + tree_bytes(state) + tree_bytes(rule_state)

    def stage(self, units: range, samples: int) -> StageSizes:
        """Returns the bytes of a micro-batch; traced once for each stage and size."""
        if (units, samples) not in self._stages:
            self._stages[units, samples] = self._trace(units, samples)
        return self._stages[units, samples]

    def _trace(self, units: range, samples: int) -> StageSizes:
        cuts = [cut for cut in (units.start, units.stop) if 0 < cut < self.units]
        cut = stages.split(self._model, cuts, rematerialise=self._rematerialise)
        stage = cut[1 if units.start else 0]
        x = self._model.shapes(samples)[units.start]
        beside = {name for unit in self._model.units[units.start :] for name in unit.sides}
        entering = (
            0
            if stage.is_first
            else tree_bytes(x)
            + tree_bytes(
                [self._model.target_shapes(samples)]
                + [self._model.side_shapes(samples)[name] for name in sorted(beside)]
            )
        )
        sides = stage.side_shapes(self._model, samples)
        if stage.is_last:  # what it keeps is among XLA's temporaries
            return StageSizes(entering, 0, 0)
        draw = trial_draw(self._model, stage, samples)
        y, residuals = stage.forward_shapes(*self._variables(units), x, draw, sides)
        return StageSizes(entering, tree_bytes(residuals), tree_bytes(y))

    def _variables(self, units: range) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        chosen = [self._model.units[i] for i in units]
        return {one.name: one.params for one in chosen}, {one.name: one.state for one in chosen}


def why_not_fit(model: Model, plan: Plan, config: Config, samples: Sequence[int]) -> str | None:
    """Returns why some host would refuse a plan before it has compiled anything, or None.

    Args:
      model: The whole model.
      plan: The plan.
      config: Resolved configuration.
      samples: Samples that each device trains on in an epoch.
    """
    hosts = hosts_of(config)
    for host in plan.hosts():
        if hosts[host].memory_mb:
            need = predict(model, plan, host, config, samples)
            if (reason := memory_excess(need, None, hosts, host, plan)) is not None:
                return reason
    return None


def check(need: Need, temporary: int | None, hosts: Hosts, host: str, plan: Plan) -> None:
    """Refuses a plan that exceeds a host's memory limit; see ``memory_excess``.

    Raises:
      RunError: It needs more.
    """
    if (reason := memory_excess(need, temporary, hosts, host, plan)) is not None:
        raise RunError(reason)


def memory_excess(
    need: Need, temporary: int | None, hosts: Hosts, host: str, plan: Plan
) -> str | None:
    """Returns why a host refuses a plan that exceeds its memory limit, or None.

    Args:
      need: The predicted need.
      temporary: Bytes of XLA's temporaries; None before anything is compiled.
      hosts: All hosts, whose limits are in MB; 0 is none.
      host: The host's name.
      plan: The plan.
    """
    total, limit_mb = need.arrays + (temporary or 0), hosts[host].memory_mb
    if not limit_mb or total <= limit_mb * 1e6:
        return None
    mb = {name: f"{nbytes / 1e6:.1f}" for name, nbytes in need._asdict().items()}
    temporaries = "" if temporary is None else f", {temporary / 1e6:.1f} for XLA's temporaries"
    return (
        f"{long_name(host)} needs {total / 1e6:.1f} MB for the plan {plan}, but is limited to "
        f"{hosts.path(host, 'memory_mb')}={limit_mb:g}: {mb['variables']} for weights, optimiser "
        f"states and gradients (copies: {need.copies}), {mb['average']} for their average, "
        f"{mb['kept']} to go back to after a loss (cohort.*), {mb['held']} "
        f"kept between forward and backward, {mb['waiting']} for tensors that wait{temporaries}. "
        f"{_remedy(host)}, or raise the limit"
    )


def cold_start_excess(model: Model, plan: Plan, hosts: Hosts, host: str) -> str | None:
    """Returns why a host may have too little memory to compile its stages, or None.

    XLA's compiler takes more than training does. The estimate is that of a process on a CPU.

    Args:
      model: The whole model.
      plan: The plan.
      hosts: All hosts, whose limits are in MB; 0 is none.
      host: The host's name.
    """
    limit_mb = hosts[host].memory_mb
    if not limit_mb:
        return None
    units = plan.held_units(hosts.first_seat(host), len(model.units))
    trained, frozen = (
        [leaf for unit in units for leaf in jax.tree.leaves(getattr(model.units[unit], part))]
        for part in ("params", "frozen")
    )
    arrays = [*trained, *frozen]
    total_mb = (
        PROCESS_MB + COMPILED_MB * len(arrays) + 3e-6 * tree_bytes(trained)
        + 1e-6 * tree_bytes(frozen)
    )  # fmt: skip
    if not arrays or total_mb <= limit_mb:
        return None
    return (
        f"{long_name(host)} may take {total_mb:.0f} MB while it compiles its {len(arrays)} arrays "
        f"of weights for the first time, and {hosts.path(host, 'memory_mb')}={limit_mb:g}; later "
        f"starts find the programs in its cache. If it is ended for that: {_remedy(host)}, or let "
        "it swap once"
    )


def _remedy(host: str) -> str:
    """Returns what makes a host's share of a plan smaller."""
    if is_node(host):
        return (
            "Move pipeline.cuts or add nodes, set pipeline.weights=shared (and "
            "pipeline.in_flight), serve fewer devices"
        )
    if host == COORDINATOR:
        return "Move pipeline.cut to the end, set pipeline.weights=shared, serve fewer devices"
    return (
        "Move pipeline.cut to the front, lower data.batch_size, set devices.defaults.rematerialise"
    )


def temporary_bytes(model: Model, replicas: Iterable[Replica], sizes: Iterable[int]) -> int:
    """Returns the largest temporary memory of a host's compiled functions, as reported by XLA.

    Functions that have run with the same shapes are not compiled again.

    Args:
      model: The whole model.
      replicas: The host's replicas.
      sizes: Micro-batch sizes.
    """
    most, sizes = 0, set(sizes)
    for replica in {one.stage.unit_names: one for one in replicas}.values():
        stage = replica.stage
        params, state = abstract(replica.params), abstract(replica.state)
        before = None if replica.single else params
        fixed = stage.frozen.shapes(stage.unit_names)
        lowered: list[Any] = replica.lower_updates()
        start = model.unit_names.index(stage.unit_names[0])
        for size in sizes:
            x, draw = model.shapes(size)[start], trial_draw(model, stage, size)
            sides = stage.side_shapes(model, size)
            if stage.is_last:
                targets = model.target_shapes(size)
                args = params, state, x, targets, draw, before, np.bool_(False), sides, fixed
                counted = (replica.count(size),) if replica.counts else ()
                lowered.append(stage.programs.loss.lower(*args, *counted))
                continue
            y, residuals = stage.forward_shapes(params, state, x, draw, sides)
            lowered.append(stage.programs.forward.lower(params, state, x, draw, sides, fixed))
            lowered.append(
                stage.programs.backward.lower(params, residuals, y, before, np.bool_(False), fixed)
            )
        for one in lowered:
            analysis = one.compile().memory_analysis()
            most = max(most, getattr(analysis, "temp_size_in_bytes", 0))
    return most


def array_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree of arrays or shapes; Python's own numbers do not count."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
