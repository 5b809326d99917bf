"""A change of plan between two rounds: a host's replicas from old replicas and arrived states.

Only the states of units move: steps, the order of samples and draws belong to (device,
step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

import stages
from pipar_jax.errors import RunError
from pipar_jax.protocol.values import EVERY
from pipar_jax.runtime import unit_state
from pipar_jax.runtime.unit_state import Key, UnitState, fitted
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.training.optimizer import CompiledOptimizer
from pipar_jax.training.replica import Replica
from stages import Model, Stage
from stages.release import PrivateRelease

#: From a device's plan to what of its stages, by their index, is clipped and noised.
Released: TypeAlias = Callable[[DevicePlan], Mapping[int, PrivateRelease]]


def assemble(
    model: Model,
    new: Plan,
    host: str,
    replicas: Mapping[tuple[int, int], Replica],
    arrived: Mapping[Key, UnitState],
    compiled: CompiledOptimizer,
    keeps: Callable[[int], Keep],
    *,
    rematerialise: bool = False,
    releases: Released | None = None,
) -> dict[tuple[int, int], Replica]:
    """Returns a host's replicas under a new plan, from its old replicas and the arrived states.

    Args:
      model: The whole model.
      new: The new plan.
      host: The host.
      replicas: Its replicas under the old plan, by (copy, stage).
      arrived: The states that ``exchanges.arriving`` lists for it.
      compiled: The optimiser.
      keeps: Returns what a copy keeps of earlier moments.
      rematerialise: Whether its stages compute forward passes again.
      releases: On a device of a private run what of its stages is released under a plan.

    Raises:
      RunError: A unit is neither here nor arrived, or its optimiser state does not fit.
    """
    held = unit_state.by_copy(replicas)
    made: dict[tuple[int, int], Replica] = {}
    for device, one in enumerate(new.devices):
        cut = cut_stages(model, one, rematerialise, releases)
        for index, stage in enumerate(cut):
            copy, _ = replica_key(new, device, index)
            if new.host(device, index) != host or (copy, index) in made:
                continue
            own = held.get(copy, {})
            missing = [u for u in stage.unit_names if u not in own and (EVERY, u) not in arrived]
            if missing:
                raise RunError(f"{host} takes over units {missing} that did not arrive")
            params = {u: own[u].params[u] for u in stage.unit_names if u in own}
            state = {u: own[u].state[u] for u in stage.unit_names if u in own}
            for unit in stage.unit_names:
                if unit not in own:
                    params[unit] = dict(arrived[EVERY, unit].params or {})
                    state[unit] = dict(arrived[EVERY, unit].state or {})
            replica = Replica(stage, params, state, compiled, keeps(copy))
            for unit, like in replica.opt_state.items():
                if unit in own:
                    replica.opt_state[unit] = own[unit].opt_state[unit]
                else:
                    opt = arrived.get((copy, unit), UnitState()).opt
                    replica.opt_state[unit] = fitted(opt, like, f"{host}: unit {unit!r}")
            made[copy, index] = replica
    return made


def samples_of(
    model: Model,
    new: Plan,
    host: str,
    compiled: CompiledOptimizer,
    keeps: Callable[[int], Keep],
    *,
    rematerialise: bool = False,
    releases: Released | None = None,
) -> Iterator[Replica]:
    """Yields a replica of zeros for each distinct stage of a host, for compilation."""
    known: set[tuple[str, ...]] = set()
    for device, one in enumerate(new.devices):
        cut = cut_stages(model, one, rematerialise, releases)
        for index, stage in enumerate(cut):
            if new.host(device, index) == host and stage.unit_names not in known:
                known.add(stage.unit_names)
                held = [unit for unit in model.units if unit.name in stage.unit_names]
                replica = Replica(
                    stage,
                    {unit.name: jax.tree.map(_zeros, dict(unit.params)) for unit in held},
                    {unit.name: jax.tree.map(_zeros, dict(unit.state)) for unit in held},
                    compiled,
                    keeps(replica_key(new, device, index)[0]),
                )
                replica.expect(single=new.has_single_micro_batches)
                yield replica


def cut_stages(
    model: Model, plan: DevicePlan, rematerialise: bool, releases: Released | None
) -> tuple[Stage, ...]:
    """Returns a device's stages under a plan.

    Args:
      model: The whole model.
      plan: The device's plan.
      rematerialise: Whether they compute forward passes again.
      releases: On a device of a private run what of its stages is released under a plan.
    """
    own = {} if releases is None else releases(plan)
    return stages.split(model, plan.cuts, rematerialise=rematerialise, releases=own)


def _zeros(one: Any) -> Any:
    return np.zeros(one.shape, one.dtype)
