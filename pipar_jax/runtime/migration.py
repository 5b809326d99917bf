"""A change of plan between two rounds: units move between hosts with their optimiser state.

All hosts hold the averaged weights then, so a host that loses a unit gives its optimiser state
alone; one that gains a unit gets that, and the weights and batch statistics from the coordinator.
Nothing else moves: steps, the order of samples and draws belong to (device, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import stages
from pipar_jax.errors import RunError
from pipar_jax.optimizer import Compiled
from pipar_jax.plan import COORDINATOR, Plan
from pipar_jax.profile import Profile
from pipar_jax.runtime.replica import Replica
from stages import Model


class Move(NamedTuple):
    """A unit of one device's model that changes its host.

    Attributes:
      device: Whose model.
      unit: The unit's index.
      source: The host that holds it under the old plan.
      target: The host that holds it under the new one.
    """

    device: int
    unit: int
    source: str
    target: str


def moves(old: Plan, new: Plan, units: int) -> list[Move]:
    """Returns the units that move when one plan follows another.

    Args:
      old: The plan so far, in parallel order with copied weights, as the new one.
      new: The plan from now on.
      units: How many units the model has.
    """
    found = []
    for device in range(len(old.devices)):
        before, after = (_holders(plan, device, units) for plan in (old, new))
        for unit, (source, target) in enumerate(zip(before, after, strict=True)):
            if source != target:
                found.append(Move(device, unit, source, target))
    return found


def moving_s(profile: Profile, some: Sequence[Move]) -> float:
    """Returns about how long units take to move: each device's link carries its own, at once."""
    times = [0.0] * len(profile.devices)
    for one in some:
        facts, device = profile.units[one.unit], profile.devices[one.device]
        up, nbytes = one.target == COORDINATOR, facts.optimizer_bytes
        if not up:
            nbytes += facts.parameter_bytes + facts.state_bytes
        times[one.device] += (device.up if up else device.down).occupied_s(nbytes)
    return max(times)


def give(
    plan: Plan,
    new: Plan,
    host: str,
    replicas: Mapping[tuple[int, int], Replica],
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns the optimiser states of the units that leave a host, by device, part and unit.

    Args:
      plan: The plan so far.
      new: The plan from now on.
      host: The host.
      replicas: Its replicas by (device, stage).
      names: The model's units in order.
    """
    held = _by_unit(replicas)
    given: dict[str, Any] = {}
    for one in moves(plan, new, len(names)):
        if one.source == host:
            unit = names[one.unit]
            state = held[one.device][unit].opt_state[unit]
            given.setdefault(str(one.device), {"opt": {}})["opt"][unit] = state
    return given


def assemble(
    model: Model,
    new: Plan,
    host: str,
    replicas: Mapping[tuple[int, int], Replica],
    arrived: Mapping[str, Any],
    compiled: Compiled,
    *,
    rematerialise: bool = False,
) -> dict[tuple[int, int], Replica]:
    """Returns a host's replicas under a new plan, made of the old ones and of what arrived.

    Args:
      model: The whole model.
      new: The new plan.
      host: The host.
      replicas: Its replicas under the old plan, by (device, stage).
      arrived: For each device (its number as text) ``params``, ``state`` and ``opt`` by unit.
      compiled: The optimiser.
      rematerialise: Whether its stages compute forward passes again.

    Raises:
      RunError: A unit is neither here nor did it arrive, or its optimiser state does not fit.
    """
    held = _by_unit(replicas)
    made: dict[tuple[int, int], Replica] = {}
    for device, one in enumerate(new.devices):
        own, came = held.get(device, {}), arrived.get(str(device), {})
        for index, stage in enumerate(stages.split(model, one.cuts, rematerialise=rematerialise)):
            if new.host(device, index) != host:
                continue
            params = {u: own[u].params[u] for u in stage.unit_names if u in own}
            state = {u: own[u].state[u] for u in stage.unit_names if u in own}
            params |= {u: w for u, w in came.get("params", {}).items() if u in stage.unit_names}
            state |= {u: w for u, w in came.get("state", {}).items() if u in stage.unit_names}
            missing = [unit for unit in stage.unit_names if unit not in params]
            if missing:
                raise RunError(f"{host} takes over units {missing} that did not arrive")
            replica = Replica(stage, params, state, compiled)
            for unit, like in replica.opt_state.items():
                if unit in own:
                    replica.opt_state[unit] = own[unit].opt_state[unit]
                else:
                    states = came.get("opt", {}).get(unit, {})
                    replica.opt_state[unit] = _fit(states, like, f"{host}: unit {unit!r}")
            made[device, index] = replica
    return made


def samples_of(
    model: Model, new: Plan, host: str, compiled: Compiled, *, rematerialise: bool = False
) -> Iterator[Replica]:
    """Yields a replica of zeros for each distinct stage of a host, to compile it with."""
    known: set[tuple[str, ...]] = set()
    for device, one in enumerate(new.devices):
        for index, stage in enumerate(stages.split(model, one.cuts, rematerialise=rematerialise)):
            if new.host(device, index) == host and stage.unit_names not in known:
                known.add(stage.unit_names)
                held = [unit for unit in model.units if unit.name in stage.unit_names]
                yield Replica(
                    stage,
                    {unit.name: jax.tree.map(_zeros, dict(unit.params)) for unit in held},
                    {unit.name: jax.tree.map(_zeros, dict(unit.state)) for unit in held},
                    compiled,
                )


def _holders(plan: Plan, device: int, units: int) -> list[str]:
    """Returns the host of each unit of a device's model."""
    return [
        plan.host(device, stage)
        for stage in range(plan.devices[device].stages)
        for _ in plan.units(device, stage, units)
    ]


def _by_unit(replicas: Mapping[tuple[int, int], Replica]) -> dict[int, dict[str, Replica]]:
    """Returns, for each device, the replica that holds each unit."""
    held: dict[int, dict[str, Replica]] = {}
    for (device, _), replica in replicas.items():
        held.setdefault(device, {}).update(dict.fromkeys(replica.stage.unit_names, replica))
    return held


def _fit(given: Any, like: Any, where: str) -> Any:
    """Returns an optimiser state of the structure, shapes and dtypes that it has to have."""
    leaves, (wanted, structure) = jax.tree.leaves(given), jax.tree.flatten(like)
    shapes = [[np.shape(leaf) for leaf in some] for some in (leaves, wanted)]
    if shapes[0] != shapes[1]:
        raise RunError(
            f"{where} came with an optimiser state of shapes {shapes[0]}, expected {shapes[1]}: do "
            "both hosts run the same version?"
        )
    fitted = [jax.numpy.array(leaf, one.dtype) for leaf, one in zip(leaves, wanted, strict=True)]
    return jax.tree.unflatten(structure, fitted)


def _zeros(one: Any) -> Any:
    return np.zeros(one.shape, one.dtype)
