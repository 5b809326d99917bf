"""What the fields of ``cohort`` mean for a run: places, quorum, and whether losses are allowed."""

from __future__ import annotations

import math
import os

from pipar_jax.config.host_fields import NodesConfig
from pipar_jax.config.membership_script import Attempt, read_script
from pipar_jax.config.plugins import check_named
from pipar_jax.config.run_fields import SELECTIONS, CohortConfig
from pipar_jax.errors import ConfigError


def places(cohort: CohortConfig, devices: int) -> int:
    """Returns how many places a round's cohort has.

    Args:
      cohort: The fields of ``cohort``.
      devices: Number of devices in the run.
    """
    if cohort.size == 0:
        return devices
    return int(cohort.size) if cohort.size >= 1 else max(1, math.ceil(cohort.size * devices))


def quorum(cohort: CohortConfig, devices: int) -> int:
    """Returns how many devices have to finish a round."""
    return cohort.quorum or places(cohort, devices)


def may_lose(cohort: CohortConfig, devices: int) -> bool:
    """Returns whether a run may go on after a device is lost, late, or not finite."""
    quota = quorum(cohort, devices) < places(cohort, devices)
    return quota or bool(cohort.first) or cohort.below != "end"


def may_lose_nodes(nodes: NodesConfig, cohort: CohortConfig, devices: int) -> bool:
    """Returns whether a run may go on after a compute node is lost."""
    return nodes.count > 0 and (nodes.replicate_every > 0 or may_lose(cohort, devices))


def keeps_state(cohort: CohortConfig) -> bool:
    """Returns whether a dropped device goes back to the optimiser state of the round's start."""
    chosen = cohort.optimizer_state
    return cohort.size == 0 if chosen == "auto" else chosen == "keep"


def planned(cohort: CohortConfig, devices: int) -> tuple[Attempt, ...]:
    """Returns the attempts of the script that a run replays; none without one.

    Raises:
      ConfigError: The script cannot be read, or does not fit the run.
    """
    if not cohort.script:
        return ()
    return read_script(cohort.script, devices, places(cohort, devices))


def check_cohort(cohort: CohortConfig, devices: int, nonfinite: str) -> None:
    """Checks the fields of ``cohort`` against each other.

    Args:
      cohort: The fields.
      devices: Number of devices in the run.
      nonfinite: ``run.nonfinite``.

    Raises:
      ConfigError: They do not fit; the message names the field, its value and the remedy.
    """
    if cohort.size > 1 and cohort.size != int(cohort.size):
        raise ConfigError(
            f"cohort.size={cohort.size:g} is neither a whole number nor a fraction below 1: write "
            "50, or 0.1"
        )
    most = places(cohort, devices)
    all_of_them = f"the {devices} devices of devices.count and devices.more"
    for field, value, limit, what in (
        ("size", most, devices, all_of_them),
        ("min_devices", cohort.min_devices, devices, all_of_them),
        ("quorum", cohort.quorum, most, f"the cohort, which has {most} devices"),
        ("first", cohort.first, most, f"the cohort, which has {most} devices"),
    ):
        if value > limit:
            raise ConfigError(f"cohort.{field}={value} is more than {what}: lower it")
    if cohort.first and cohort.first < cohort.quorum:
        raise ConfigError(
            f"cohort.first={cohort.first} is less than cohort.quorum={cohort.quorum}, so a round "
            "would end before its quorum is there: raise one or lower the other"
        )
    check_named(cohort.select, "cohort.select", "a way to choose devices", SELECTIONS)
    if 0 < cohort.min_devices < max(cohort.quorum, cohort.first):
        raise ConfigError(
            f"cohort.min_devices={cohort.min_devices} is less than the "
            f"{max(cohort.quorum, cohort.first)} that a round needs: raise it"
        )
    if cohort.script and not os.path.isfile(cohort.script):
        raise ConfigError(
            f"cohort.script={cohort.script!r}: there is no such file, or this user may not see it"
        )
    if nonfinite == "drop" and not may_lose(cohort, devices):
        raise ConfigError(
            "run.nonfinite=drop leaves a device out of a round, and cohort.quorum=0 needs all of "
            "them: set cohort.quorum"
        )
