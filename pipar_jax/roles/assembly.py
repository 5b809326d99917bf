"""How a run gathers the hosts that it begins with."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

from pipar_jax.config import CohortConfig, Hosts
from pipar_jax.errors import JoinError
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.waits import LOOK_S
from pipar_jax.schedule.plan import is_device

#: Number of missing hosts that an error names.
MOST_NAMED = 20


class _Wanted(NamedTuple):
    """The hosts that a run begins with.

    Attributes:
      nodes: Compute nodes that are waited for.
      devices: Devices that are waited for; others may come in their stead.
      least: Devices without which it does not begin.
      some_nodes: Whether it begins with some of the nodes.
    """

    nodes: tuple[str, ...]
    devices: tuple[str, ...]
    least: int
    some_nodes: bool

    def missing(self, here: Collection[str]) -> list[str]:
        """Returns the hosts that are waited for and not there."""
        return [name for name in (*self.nodes, *self.devices) if name not in here]

    def is_enough(self, here: Collection[str]) -> bool:
        """Returns whether a run can begin; whoever comes in addition counts as well."""
        nodes = [name in here for name in self.nodes]
        whole = any(nodes) or not nodes if self.some_nodes else all(nodes)
        return whole and sum(map(is_device, here)) >= self.least


def assemble(
    members: Membership, cohort: CohortConfig, limit_s: float, recorded: Collection[str] = ()
) -> None:
    """Waits until every compute node and the number of devices to begin with have joined.

    With ``cohort.min_devices`` of them it begins when none has joined for ``cohort.wait_s``. A run
    that is resumed waits for the hosts that it had, and goes on without those that have not come in
    time, if it may lose them.

    Args:
      members: The devices and compute nodes.
      cohort: How many devices are needed.
      limit_s: Seconds within which they must have joined.
      recorded: The hosts that a run had which is resumed.

    Raises:
      JoinError: Too few have.
    """
    wanted = _wanted(members.hosts, cohort, recorded)
    began = changed = time.monotonic()
    told: list[str] = []
    here = members.by_name
    while (missing := wanted.missing(here)) or not wanted.is_enough(here):
        if missing != told:
            told, changed = missing, time.monotonic()
            members.tell({"event": "waiting", "missing": missing})
        enough = wanted.is_enough(here)
        left_s = changed + cohort.wait_s if enough and not recorded else began + limit_s
        left_s -= time.monotonic()
        if left_s <= 0 and enough:
            if recorded:
                members.tell({"event": "resumed_without", "missing": missing})
            return
        if left_s <= 0:
            raise _too_few(wanted, here, limit_s)
        members.poll(min(left_s, LOOK_S))


def _wanted(hosts: Hosts, cohort: CohortConfig, recorded: Collection[str]) -> _Wanted:
    """Returns the hosts that a run begins with."""
    if not recorded:
        least = cohort.min_devices or len(hosts.expected)
        return _Wanted(hosts.nodes, hosts.expected, least, some_nodes=False)
    devices = tuple(name for name in hosts.devices if name in recorded)
    least = len(devices)
    if all(map(hosts.may_be_lost, devices)):
        least = cohort.min_devices or cohort.quorum or cohort.first or 1
    some_nodes = hosts.may_lose_nodes
    nodes = tuple(name for name in hosts.nodes if name in recorded or not some_nodes)
    return _Wanted(nodes, devices, least, some_nodes)


def _too_few(wanted: _Wanted, here: Collection[str], limit_s: float) -> JoinError:
    """Returns the error of a run for which too few hosts have come."""
    missing = wanted.missing(here)
    more = len(missing) - MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    which = f"{', '.join(missing[:MOST_NAMED])}{rest} of {len(wanted.nodes) + len(wanted.devices)}"
    if not missing:
        which = f"{wanted.least - sum(map(is_device, here))} more"
    return JoinError(
        f"{which} hosts did not join within {limit_s:g} s, and {wanted.least} devices are needed: "
        "start them, lower cohort.min_devices, or raise network.join_timeout_s"
    )
