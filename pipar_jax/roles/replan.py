"""Conducts a change of plan: asks hosts for what leaves them, and hands on what they gain."""

from __future__ import annotations

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.protocol import messages
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.membership import Membership
from pipar_jax.runtime import migration, moves, weight_bundle
from pipar_jax.runtime.host import Host
from pipar_jax.schedule.plan import Plan, long_name
from stages.trees import PyTree


def conduct(
    members: Membership,
    host: Host,
    holdings: Holdings,
    old: Plan,
    new: Plan,
    aggregator: Aggregator,
) -> None:
    """Lets all hosts change their plan; runs on the coordinator, between two rounds.

    Args:
      members: The devices and compute nodes.
      host: The host in this process.
      holdings: What bundles hold of the model.
      old: The plan so far.
      new: The plan from now on; its neighbours have met.
      aggregator: The coordinator's, which takes over what compute nodes averaged so far.

    Raises:
      PeerError: A device or node was lost or failed.
      RunError: This process failed, or a host gave what does not fit the model.
    """
    hosts = (host.name, *members.by_name)
    members.broadcast(messages.Give(new))
    host.give(new)
    opt: dict[str, dict[str, PyTree]] = {}
    for name, mail in members.collect(messages.Given, hosts).items():
        with members.reading(name):
            wanted = holdings.given(old, new, name)
            groups = holdings.arrays(mail.message, mail.arrays, wanted, long_name(name))
        for group, parts in groups.items():
            if group == migration.WHOLE:
                migration.put(aggregator, parts, name)
            else:
                opt.setdefault(group, {}).update(parts.get("opt", {}))
    arrived: dict[str, dict[str, PyTree]] = {name: {} for name in hosts}
    for one in moves.moves(old, new, len(holdings.names)):
        unit, copy = holdings.names[one.unit], str(one.copy)
        parts = arrived[one.target].setdefault(copy, {"opt": {}})
        parts["opt"][unit] = opt.get(copy, {}).get(unit, ())
        migration.take(aggregator, unit, "params", "state", into=arrived[one.target])
    for name in hosts:
        for index in moves.local_to(name, new, besides=old, units=len(holdings.names)):
            unit = holdings.names[index]
            migration.take(aggregator, unit, "rule_state", into=arrived[name])
    for name in members.by_name:
        members.send_bundle(name, messages.Adopt(new), weight_bundle.pack(arrived[name]))
    host.adopt(new, arrived[host.name])
    members.collect(messages.Adopted, hosts)
