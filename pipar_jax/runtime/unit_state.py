"""The state of units, and the one way in which it leaves a host and comes to one.

Averaging, handing the client-side model on, a change of plan, evaluation and checkpoints move
weights, statistics, optimiser states and the states of the rule that averages. All of them name
what they want by copy and unit (``Wanted``), and move it as ``States``: over a link as named
tensors, or within a process as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from comms.arrays import Array
from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.errors import RunError
from pipar_jax.protocol.values import EVERY, PARTS, Part, StateRow
from pipar_jax.training.replica import Replica
from stages.trees import PyTree

#: A copy (a place's number, ``ALL`` or ``EVERY``) and the name of a unit.
Key = tuple[int, str]
#: Which parts of which units.
Wanted = dict[Key, tuple[Part, ...]]
#: Arrays by name, as a bundle carries them.
Tensors = dict[str, Array]
T = TypeVar("T")


class UnitState(NamedTuple):
    """What one copy of a unit is made of; None for what is not spoken of.

    Attributes:
      params: Its weights by path, without the personal ones: those never leave a host.
      state: Its batch statistics by path.
      opt: The state of its optimiser, a pytree.
      rule: The state of the rule that averages it, a pytree.
    """

    params: Mapping[str, PyTree] | None = None
    state: Mapping[str, PyTree] | None = None
    opt: Any = None
    rule: Any = None


States = dict[Key, UnitState]


def rows(wanted: Mapping[Key, Collection[Part]]) -> tuple[StateRow, ...]:
    """Returns what is wanted as a message says it."""
    return tuple(StateRow(copy, unit, tuple(parts)) for (copy, unit), parts in wanted.items())


def leaves(part: Part, values: PyTree) -> dict[str, PyTree]:
    """Returns a part's arrays by path, or numbered where it is an optimiser's or rule's tree."""
    if part in ("params", "state"):
        return dict(values)
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(values))}


def tensor_name(key: Key, part: Part, path: str) -> str:
    """Returns what an array is called in a bundle."""
    return f"{key[0]}/{part}/{key[1]}/{path}"


def pack(states: Mapping[Key, UnitState]) -> Tensors:
    """Returns the arrays of some states by name."""
    return {
        tensor_name(key, part, path): np.asarray(array)
        for key, one in states.items()
        for part, values in zip(PARTS, one, strict=True)
        if values is not None
        for path, array in leaves(part, values).items()
    }


def unpack(tensors: Mapping[str, Array], wanted: Mapping[Key, Collection[Part]]) -> States:
    """Returns the wanted states among arrays that ``pack`` named; what is not there is empty."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, array in tensors.items():
        copy, part, unit, path = name.split("/", 3)
        groups.setdefault((copy, part, unit), {})[path] = array
    return {
        (copy, unit): UnitState(**{part: groups.get((str(copy), part, unit), {}) for part in parts})
        for (copy, unit), parts in wanted.items()
    }


def chosen(tensors: Mapping[str, T], wanted: Mapping[Key, Collection[Part]]) -> dict[str, T]:
    """Returns those of the wanted states among arrays that ``pack`` named, by the same names."""
    groups = {(str(copy), part, unit) for (copy, unit), parts in wanted.items() for part in parts}
    return {name: one for name, one in tensors.items() if tuple(name.split("/", 3)[:3]) in groups}


def held(
    wanted: Mapping[Key, Collection[Part]],
    replicas: Mapping[tuple[int, int], Replica],
    averages: Mapping[str, Aggregator],
) -> States:
    """Returns a host's own states, not copied: the next update takes their arrays away.

    Args:
      wanted: What to return, all of which the host has.
      replicas: Its replicas by (copy, stage).
      averages: For each unit that is averaged on it what averages it.
    """
    copies = by_copy(replicas)
    found = {}
    for (copy, unit), parts in wanted.items():
        among = copies.values() if copy == EVERY else (copies[copy],)
        replica = next((one[unit] for one in among if unit in one), None)
        values: dict[str, PyTree] = {}
        for part in parts:
            if part == "rule":
                values[part] = averages[unit].rule_state[unit]
            else:
                assert replica is not None
                source = {
                    "params": replica.shared, "state": replica.state, "opt": replica.opt_state
                }  # fmt: skip
                values[part] = source[part][unit]
        found[copy, unit] = UnitState(**values)
    return found


def known(wanted: Mapping[Key, Collection[Part]], aggregator: Aggregator) -> States:
    """Returns what an aggregator knows of some units."""
    sources = {
        "params": aggregator.params,
        "state": aggregator.state,
        "rule": aggregator.rule_state,
    }
    return {
        key: UnitState(**{part: sources[part][key[1]] for part in parts})
        for key, parts in wanted.items()
    }


def copied(states: Mapping[Key, UnitState]) -> States:
    """Returns states as numpy arrays of their own."""
    found: States = jax.tree.map(np.array, dict(states))
    return found


def load(
    states: Mapping[Key, UnitState],
    replicas: Mapping[tuple[int, int], Replica],
    averages: Mapping[str, Aggregator],
    where: str,
) -> None:
    """Replaces what a host has of some units by copies.

    Args:
      states: The states; those of EVERY copy go to all replicas of their units.
      replicas: The host's replicas by (copy, stage).
      averages: For each unit that is averaged on it what averages it.
      where: The host, for the message.

    Raises:
      RunError: A state does not fit.
    """
    for (copy, _), replica in replicas.items():
        for unit in replica.stage.unit_names:  # one by one, so that few are there twice
            for key in ((EVERY, unit), (copy, unit)):
                one = states.get(key, UnitState())
                if one.params is not None and one.state is not None:
                    replica.load({unit: one.params}, {unit: one.state}, (unit,))
                if one.opt is not None:
                    like = replica.opt_state[unit]
                    replica.opt_state[unit] = fitted(one.opt, like, f"{where}: unit {unit!r}")
    for unit, aggregator in averages.items():
        take(aggregator, {key: states[key] for key in ((EVERY, unit),) if key in states}, where)


def take(aggregator: Aggregator, states: Mapping[Key, UnitState], where: str) -> None:
    """Replaces what an aggregator knows of some units.

    Args:
      aggregator: Who averages these units from now on, or hands them on.
      states: Weights, batch statistics and the rule's state, as far as they are there.
      where: Who gave them, for the message.

    Raises:
      RunError: A state of the rule does not fit.
    """
    for (_, unit), one in states.items():
        if one.params is not None:
            aggregator.params[unit] = dict(one.params)
        if one.state is not None:
            aggregator.state[unit] = dict(one.state)
        if one.rule is not None:
            like = aggregator.rule_state[unit]
            aggregator.rule_state[unit] = fitted(one.rule, like, f"{where}: average of {unit!r}")


def amend(aggregator: Aggregator, states: Mapping[Key, UnitState]) -> None:
    """Replaces the arrays that are given of what an aggregator knows; the others stay.

    Args:
      aggregator: Who averages these units.
      states: Some of the weights and batch statistics of some units.
    """
    for (_, unit), one in states.items():
        for held, given in ((aggregator.params, one.params), (aggregator.state, one.state)):
            if given:
                held[unit] = {**held[unit], **jax.device_put(dict(given))}


def merged(some: Iterable[Mapping[Key, UnitState]]) -> States:
    """Returns several hosts' states as one: what each says is added to what others say."""
    found: States = {}
    for states in some:
        for key, one in states.items():
            before = found.get(key, UnitState())
            found[key] = UnitState(
                *(old if new is None else new for old, new in zip(before, one, strict=True))
            )
    return found


def by_copy(replicas: Mapping[tuple[int, int], Replica]) -> dict[int, dict[str, Replica]]:
    """Returns, for each copy, the replica that holds each unit."""
    found: dict[int, dict[str, Replica]] = {}
    for (copy, _), replica in replicas.items():
        found.setdefault(copy, {}).update(dict.fromkeys(replica.stage.unit_names, replica))
    return found


def fitted(given: Any, like: Any, where: str) -> Any:
    """Returns a copy of an optimiser's or rule's state, of the structure that it has to have.

    Args:
      given: A pytree.
      like: A state as it has to be.
      where: Whose it is, for the message.

    Raises:
      RunError: Numbers, shapes or dtypes of the leaves differ.
    """
    found, (wanted, structure) = jax.tree.leaves(given), jax.tree.flatten(like)
    kinds = [[f"{one.dtype}{[*one.shape]}" for one in some] for some in (found, wanted)]
    if kinds[0] != kinds[1]:
        raise RunError(
            f"{where} came with an optimiser state of {kinds[0]}, expected {kinds[1]}: do both "
            "hosts run the same version?"
        )
    copies = [jax.numpy.array(leaf, one.dtype) for leaf, one in zip(found, wanted, strict=True)]
    return jax.tree.unflatten(structure, copies)
