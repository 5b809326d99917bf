"""How a run gathers the hosts that it begins with."""

from __future__ import annotations

import time

from pipar_jax.config import CohortConfig
from pipar_jax.errors import JoinError
from pipar_jax.roles.membership import LOOK_S, Membership
from pipar_jax.schedule.plan import is_node

#: Number of missing hosts that an error names.
MOST_NAMED = 20


def assemble(members: Membership, cohort: CohortConfig, limit_s: float) -> None:
    """Waits until every compute node and the number of devices to begin with have joined.

    With ``cohort.min_devices`` of them it begins when none has joined for ``cohort.wait_s``.

    Args:
      members: The devices and compute nodes.
      cohort: How many devices are needed.
      limit_s: Seconds within which they must have joined.

    Raises:
      JoinError: Too few have.
    """
    nodes, devices = members.hosts.nodes, members.hosts.expected
    least = cohort.min_devices or len(devices)
    began = changed = time.monotonic()
    told: list[str] = []
    while missing := [name for name in (*nodes, *devices) if name not in members.by_name]:
        if missing != told:
            told, changed = missing, time.monotonic()
            members.tell({"event": "waiting", "missing": missing})
        # Whoever comes in addition counts as well.
        here = sum(not is_node(name) for name in members.by_name)
        enough = here >= least and all(name in members.by_name for name in nodes)
        left_s = changed + cohort.wait_s if enough else began + limit_s
        left_s -= time.monotonic()
        if left_s <= 0 and enough:
            return
        if left_s <= 0:
            more = len(missing) - MOST_NAMED
            rest = f" and {more} more" if more > 0 else ""
            raise JoinError(
                f"{', '.join(missing[:MOST_NAMED])}{rest} of {len(nodes) + len(devices)} hosts "
                f"did not join within {limit_s:g} s, and {least} devices are needed: start them, "
                "lower cohort.min_devices, or raise network.join_timeout_s"
            )
        members.poll(min(left_s, LOOK_S))
