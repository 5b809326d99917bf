"""Conducts a change of plan: asks hosts for what leaves them, and hands on what they gain."""

from __future__ import annotations

from typing import Any

from pipar_jax.aggregation import Aggregator
from pipar_jax.plan import Plan
from pipar_jax.runtime import bundle, migration, moving
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.members import Mail, Members
from stages import Model


def conduct(
    members: Members, host: Host, model: Model, old: Plan, new: Plan, aggregator: Aggregator
) -> None:
    """Lets all hosts change their plan; runs on the coordinator, between two rounds.

    Args:
      members: The devices and compute nodes.
      host: The host in this process.
      model: The whole model.
      old: The plan so far.
      new: The plan from now on; its neighbours have met.
      aggregator: The coordinator's, which takes over what compute nodes averaged so far.

    Raises:
      PeerError: A device or node was lost or failed.
      RunError: This process failed, or a host gave what does not fit the model.
    """
    hosts = (host.name, *members.by_name)
    members.broadcast({"type": "give", "plan": new.to_dict()})
    host.give(new)
    opt: dict[str, dict[str, Any]] = {}
    for name, mail in members.collect("given", hosts).items():
        for group, parts in _given(name, mail, model).items():
            if group == migration.WHOLE:
                migration.put(aggregator, parts, name)
            else:
                opt.setdefault(group, {}).update(parts.get("opt", {}))
    arrived: dict[str, dict[str, Any]] = {name: {} for name in hosts}
    for one in moving.moves(old, new, len(model.units)):
        unit, copy = model.unit_names[one.unit], str(one.copy)
        parts = arrived[one.target].setdefault(copy, {"opt": {}})
        parts["opt"][unit] = opt.get(copy, {}).get(unit, ())
        migration.take(aggregator, unit, "params", "state", into=arrived[one.target])
    for name in hosts:
        for index in moving.local_to(name, new, besides=old, units=len(model.units)):
            unit = model.unit_names[index]
            migration.take(aggregator, unit, "rule_state", into=arrived[name])
    for name in members.by_name:
        body = {"type": "adopt", "plan": new.to_dict()}
        members.send_bundle(name, "adopt", bundle.pack(arrived[name]), body)
    host.adopt(new, arrived[host.name])
    members.collect("adopted", hosts)


def _given(name: str, mail: Mail, model: Model) -> dict[str, Any]:
    """Returns what a host gave, checked if it came over a link."""
    if mail.message is None:
        return mail.arrays
    if mail.message.kind != "bundle":
        return {}
    groups = bundle.unpack(mail.message.tensors, name)
    bundle.check_groups(groups, model, name)
    return groups
