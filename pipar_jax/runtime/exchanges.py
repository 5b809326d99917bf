"""Which states of units leave a host or come to it on which occasion: pure questions on plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipar_jax.protocol.values import EVERY, Part
from pipar_jax.runtime.moves import holders, local_to, moves
from pipar_jax.runtime.unit_state import Key, Wanted
from pipar_jax.schedule.actions import ALL
from pipar_jax.schedule.host_program import replica_key
from pipar_jax.schedule.plan import OWNER, Order, Plan, WeightPolicy, is_device

#: Parts of a unit.
Parts = tuple[Part, ...]
_VARIABLES: Parts = ("params", "state")


def trained(plan: Plan, host: str, names: Sequence[str]) -> Wanted:
    """Returns what a host gives to the average: its copies of what others have as well.

    In sequential order nothing is averaged.

    Args:
      plan: The plan.
      host: The host's name.
      names: The model's units in order.
    """
    local = set(plan.local_stages(host))
    if plan.order == Order.SEQUENTIAL:
        return {}
    return {
        (replica_key(plan, place, stage)[0], names[unit]): _VARIABLES
        for place, one in enumerate(plan.devices)
        for stage in range(one.stages)
        if plan.host(place, stage) == host and stage not in local
        for unit in plan.units(place, stage, len(names))
    }


def averaged(plan: Plan, host: str, names: Sequence[str]) -> Wanted:
    """Returns what a host is given back of the average."""
    local = plan.local_units(host, len(names))
    return {
        (EVERY, names[unit]): _VARIABLES
        for unit in plan.held_units(host, len(names))
        if unit not in local
    }


def client_model(plan: Plan, place: int, names: Sequence[str]) -> Wanted:
    """Returns the client-side model with its optimiser state, as devices hand it on in turn."""
    return {
        (EVERY, names[unit]): (*_VARIABLES, "opt")
        for stage, host in enumerate(plan.devices[place].hosts)
        if host == OWNER
        for unit in plan.units(place, stage, len(names))
    }


def kept(plan: Plan, host: str, names: Sequence[str], *, rule: bool = False) -> Wanted:
    """Returns what a host alone has the last weights of: what is shared or averaged there.

    Args:
      plan: The plan.
      host: The host's name.
      names: The model's units in order.
      rule: Whether the states of the rule that averages there are wanted as well.
    """
    local = {names[unit] for unit in plan.local_units(host, len(names))}
    shared = {
        names[unit]
        for (copy, unit), holder in holders(plan, len(names)).items()
        if holder == host and copy == ALL
    }
    found: Wanted = {(EVERY, name): _VARIABLES for name in names if name in local | shared}
    if rule:
        found |= {(EVERY, name): (*_VARIABLES, *_rule(plan)) for name in local}
    return found


def whole(plan: Plan, host: str, names: Sequence[str], *, optimizers: bool) -> Wanted:
    """Returns what a host takes over when it begins from a state of the run.

    Args:
      plan: The plan.
      host: The host's name.
      names: The model's units in order.
      optimizers: Whether the optimiser states of its copies come with it.
    """
    found: Wanted = {(EVERY, names[unit]): _VARIABLES for unit in plan.held_units(host, len(names))}
    for unit in plan.local_units(host, len(names)):
        found[EVERY, names[unit]] = (*_VARIABLES, *_rule(plan))
    return joined(found, optimizer_states(plan, host, names) if optimizers else {})


def optimizer_states(plan: Plan, host: str, names: Sequence[str]) -> Wanted:
    """Returns the optimiser states of a host's copies; one that is handed on is of EVERY copy."""
    handed_on = plan.order == Order.SEQUENTIAL and is_device(host)
    return {
        (EVERY if handed_on else copy, names[unit]): ("opt",)
        for (copy, unit), holder in holders(plan, len(names)).items()
        if holder == host
    }


def keeps_optimizer(plan: Plan, host: str) -> bool:
    """Returns whether a host has optimiser states that nobody else has at a round's end."""
    return not (plan.order == Order.SEQUENTIAL and is_device(host))


def joined(*some: Mapping[Key, tuple[Part, ...]]) -> Wanted:
    """Returns all that is wanted, each part of a unit once."""
    found: Wanted = {}
    for one in some:
        for key, parts in one.items():
            found[key] = tuple(dict.fromkeys((*found.get(key, ()), *parts)))
    return found


def leaving(old: Plan, new: Plan, host: str, names: Sequence[str]) -> Wanted:
    """Returns what leaves a host when one plan follows another.

    All copies of a unit are equal then, so optimiser states alone move from where copies are to
    where they will be; weights and statistics are the coordinator's. Of units that live together
    on a compute node that node gives them, and the state of the rule that averaged them there.
    """
    found: Wanted = {
        (one.copy, names[one.unit]): ("opt",)
        for one in moves(old, new, len(names))
        if one.source == host
    }
    for unit in local_to(host, old, besides=new, units=len(names)):
        found[EVERY, names[unit]] = (*_VARIABLES, *_rule(old))
    return found


def arriving(old: Plan, new: Plan, host: str, names: Sequence[str]) -> Wanted:
    """Returns what comes to a host when one plan follows another."""
    gained = [one for one in moves(old, new, len(names)) if one.target == host]
    found: Wanted = {(one.copy, names[one.unit]): ("opt",) for one in gained}
    found |= {(EVERY, names[one.unit]): _VARIABLES for one in gained}
    for unit in local_to(host, new, besides=old, units=len(names)):
        key = EVERY, names[unit]
        found[key] = (*found.get(key, ()), *_rule(new))
    return found


def _rule(plan: Plan) -> tuple[Part, ...]:
    """Returns the rule's part, unless there is one copy alone, and nothing to average."""
    return ("rule",) if plan.weights == WeightPolicy.COPY else ()
