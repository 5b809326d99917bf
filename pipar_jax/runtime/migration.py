"""A change of plan between two rounds: units move between hosts with their optimiser state.

All copies of a unit are equal then, so a host that loses one gives that copy's optimiser state
alone, and one that gains it gets that, and the weights and batch statistics from the coordinator.
The coordinator's own are those of the last average; of units that lived together on a compute node
that node gives them, and the state of the rule that averaged them there. Nothing else moves: steps,
the order of samples and draws belong to (device, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import stages
from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.errors import RunError
from pipar_jax.runtime import weight_bundle
from pipar_jax.runtime.moves import local_to, moves
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.plan import Plan
from pipar_jax.training.optimizer import CompiledOptimizer
from pipar_jax.training.replica import Replica
from stages import Model
from stages.trees import PyTree

#: The group of arrays, beside those of each copy, that holds what all copies have in common.
WHOLE = "whole"


def give(
    plan: Plan,
    new: Plan,
    host: str,
    replicas: Mapping[tuple[int, int], Replica],
    averages: Mapping[str, Aggregator],
    names: Sequence[str],
) -> dict[str, PyTree]:
    """Returns what leaves a host: optimiser states by copy, the rest under WHOLE.

    Args:
      plan: The plan so far.
      new: The plan from now on.
      host: The host.
      replicas: Its replicas by (copy, stage).
      averages: For each unit that is averaged on this host what averages it.
      names: The model's units in order.
    """
    held = _by_unit(replicas)
    given: dict[str, PyTree] = {}
    for one in moves(plan, new, len(names)):
        if one.source == host:
            unit = names[one.unit]
            state = held[one.copy][unit].opt_state[unit]
            given.setdefault(str(one.copy), {"opt": {}})["opt"][unit] = state
    for index in local_to(host, plan, besides=new, units=len(names)):
        unit = names[index]
        replica = next(one[unit] for one in held.values() if unit in one)
        parts = given.setdefault(WHOLE, {"params": {}, "state": {}, "rule_state": {}})
        parts["params"][unit], parts["state"][unit] = replica.params[unit], replica.state[unit]
        if unit in averages:
            parts["rule_state"][unit] = averages[unit].rule_state[unit]
    return given


def put(aggregator: Aggregator, parts: Mapping[str, PyTree], peer: str) -> None:
    """Lets an aggregator take over what ``give`` returned under WHOLE.

    Args:
      aggregator: Who averages these units from now on, or hands them on.
      parts: Weights, batch statistics and the rule's state by unit.
      peer: Who gave them.

    Raises:
      RunError: The rule's state does not fit.
    """
    own = weight_bundle.part_of({WHOLE: parts}, WHOLE)
    aggregator.params.update(own["params"])
    aggregator.state.update(own["state"])
    put_rule(aggregator, parts.get("rule_state", {}), peer)


def put_rule(aggregator: Aggregator, states: Mapping[str, PyTree], where: str) -> None:
    """Gives an aggregator the rule's state of units that were averaged elsewhere so far.

    Raises:
      RunError: A state does not fit.
    """
    for unit, state in states.items():
        like = aggregator.rule_state.get(unit)
        if like is None:
            raise RunError(f"{where} gave the average's state of {unit!r}, which is not known here")
        aggregator.rule_state[unit] = fitted(state, like, f"{where}: the average of {unit!r}")


def take(aggregator: Aggregator, unit: str, *parts: str, into: dict[str, PyTree]) -> None:
    """Adds some of what the coordinator knows of a unit to what a host is handed."""
    for part in parts:
        whole = into.setdefault(WHOLE, {})
        whole.setdefault(part, {})[unit] = getattr(aggregator, part)[unit]


def assemble(
    model: Model,
    new: Plan,
    host: str,
    replicas: Mapping[tuple[int, int], Replica],
    arrived: Mapping[str, PyTree],
    compiled: CompiledOptimizer,
    *,
    rematerialise: bool = False,
) -> dict[tuple[int, int], Replica]:
    """Returns a host's replicas under a new plan, made of the old ones and of what arrived.

    Args:
      model: The whole model.
      new: The new plan.
      host: The host.
      replicas: Its replicas under the old plan, by (copy, stage).
      arrived: For each copy (its number as text) ``opt`` by unit, and under WHOLE ``params`` and
        ``state`` by unit.
      compiled: The optimiser.
      rematerialise: Whether its stages compute forward passes again.

    Raises:
      RunError: A unit is neither here nor did it arrive, or its optimiser state does not fit.
    """
    held, whole = _by_unit(replicas), weight_bundle.part_of(arrived, WHOLE)
    empty = {unit.name for unit in model.units if not unit.params}  # they travel as nothing
    made: dict[tuple[int, int], Replica] = {}
    for device, one in enumerate(new.devices):
        for index, stage in enumerate(stages.split(model, one.cuts, rematerialise=rematerialise)):
            copy, _ = replica_key(new, device, index)
            if new.host(device, index) != host or (copy, index) in made:
                continue
            own, came = held.get(copy, {}), weight_bundle.part_of(arrived, str(copy))
            params = {u: own[u].params[u] for u in stage.unit_names if u in own}
            state = {u: own[u].state[u] for u in stage.unit_names if u in own}
            for unit in stage.unit_names:
                if unit not in params and (unit in whole["params"] or unit in empty):
                    params[unit] = whole["params"].get(unit, {})
                    state[unit] = whole["state"].get(unit, {})
            missing = [unit for unit in stage.unit_names if unit not in params]
            if missing:
                raise RunError(f"{host} takes over units {missing} that did not arrive")
            replica = Replica(stage, params, state, compiled)
            for unit, like in replica.opt_state.items():
                if unit in own:
                    replica.opt_state[unit] = own[unit].opt_state[unit]
                else:
                    states = came["opt"].get(unit, {})
                    replica.opt_state[unit] = fitted(states, like, f"{host}: unit {unit!r}")
            made[copy, index] = replica
    return made


def samples_of(
    model: Model, new: Plan, host: str, compiled: CompiledOptimizer, *, rematerialise: bool = False
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


def fitted(given: PyTree, like: PyTree, where: str) -> Any:
    """Returns a state of the structure, shapes and dtypes that it has to have.

    Args:
      given: A pytree, or its leaves by number as a bundle carries them.
      like: A state as it has to be.
      where: Whose it is, for the message.

    Raises:
      RunError: Numbers, shapes or dtypes of the leaves differ.
    """
    leaves, (wanted, structure) = jax.tree.leaves(given), jax.tree.flatten(like)
    kinds = [[f"{one.dtype}{[*one.shape]}" for one in some] for some in (leaves, wanted)]
    if kinds[0] != kinds[1]:
        raise RunError(
            f"{where} came with an optimiser state of {kinds[0]}, expected {kinds[1]}: do both "
            "hosts run the same version?"
        )
    fitted = [jax.numpy.array(leaf, one.dtype) for leaf, one in zip(leaves, wanted, strict=True)]
    return jax.tree.unflatten(structure, fitted)


def _by_unit(replicas: Mapping[tuple[int, int], Replica]) -> dict[int, dict[str, Replica]]:
    """Returns, for each copy, the replica that holds each unit."""
    held: dict[int, dict[str, Replica]] = {}
    for (copy, _), replica in replicas.items():
        held.setdefault(copy, {}).update(dict.fromkeys(replica.stage.unit_names, replica))
    return held


def _zeros(one: Any) -> Any:
    return np.zeros(one.shape, one.dtype)
