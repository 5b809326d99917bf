"""Which chains can take over from a chain that has lost a compute node."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from pipar_jax.schedule.plan import DevicePlan, Plan, host_index, is_node


def chain_nodes(plan: Plan) -> tuple[str, ...]:
    """Returns the compute nodes that have stages under a plan."""
    return tuple(filter(is_node, plan.hosts()))


def replacements(plan: Plan, there: Collection[str]) -> Iterator[Plan]:
    """Yields the chains over the nodes that are left, in the order in which they are tried.

    A node that holds no stage takes the place of a lost one; otherwise the units of the lost one go
    to the node before it in the chain, or to the node behind it. What is on devices stays there.

    Args:
      plan: The plan so far.
      there: The compute nodes that are left.
    """
    lost = next((name for name in chain_nodes(plan) if name not in there), None)
    if lost is None:
        yield plan
        return
    spare = sorted(set(there).difference(chain_nodes(plan)), key=host_index)
    changed = [_renamed(plan, lost, name) for name in spare]
    changed += [_merged(plan, lost, beside) for beside in (-1, 1)]
    for change in filter(None, changed):
        yield from replacements(change, there)


def _renamed(plan: Plan, lost: str, name: str) -> Plan | None:
    """Returns a plan in which one node has the stages of another."""
    return dataclasses.replace(
        plan,
        devices=tuple(
            dataclasses.replace(
                device, hosts=tuple(name if host == lost else host for host in device.hosts)
            )
            for device in plan.devices
        ),
    )


def _merged(plan: Plan, lost: str, beside: int) -> Plan | None:
    """Returns a plan in which the units of a node are its neighbour's, if that is a node."""
    devices = []
    for device in plan.devices:
        if lost not in device.hosts:
            devices.append(device)
            continue
        index = device.hosts.index(lost)
        other = index + beside
        if not 0 <= other < device.stages or not is_node(device.hosts[other]):
            return None
        cut = min(index, other)
        devices.append(
            DevicePlan(
                (*device.cuts[:cut], *device.cuts[cut + 1 :]),
                (*device.hosts[:index], *device.hosts[index + 1 :]),
                device.micro_batches,
                (*device.codecs[:cut], *device.codecs[cut + 1 :]),
            )
        )
    return dataclasses.replace(plan, devices=tuple(devices))
