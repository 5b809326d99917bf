"""What the fields of ``cohort`` mean for a run: places, quorum, and whether losses are allowed."""

from __future__ import annotations

import math
import pathlib

from pipar_jax.config.fields import Config
from pipar_jax.config.membership_script import Attempt, read_script
from pipar_jax.config.plugins import check_named
from pipar_jax.config.run_fields import SELECTIONS
from pipar_jax.errors import ConfigError


def places(config: Config) -> int:
    """Returns how many places a round's cohort has."""
    size, count = config.cohort.size, config.devices.count
    if size == 0:
        return count
    return int(size) if size >= 1 else max(1, math.ceil(size * count))


def quorum(config: Config) -> int:
    """Returns how many devices have to finish a round."""
    return config.cohort.quorum or places(config)


def may_lose(config: Config) -> bool:
    """Returns whether a run may go on after a device is lost, late, or not finite."""
    cohort = config.cohort
    return quorum(config) < places(config) or bool(cohort.first) or cohort.below != "end"


def keeps_state(config: Config) -> bool:
    """Returns whether a dropped device goes back to the optimiser state of the round's start."""
    chosen = config.cohort.optimizer_state
    return config.cohort.size == 0 if chosen == "auto" else chosen == "keep"


def planned(config: Config) -> tuple[Attempt, ...]:
    """Returns the attempts of the script that a run replays; none without one.

    Raises:
      ConfigError: The script cannot be read, or does not fit the run.
    """
    if not config.cohort.script:
        return ()
    return read_script(config.cohort.script, config.devices.count, places(config))


def check_cohort(config: Config) -> None:
    """Checks the fields of ``cohort`` against each other.

    Raises:
      ConfigError: They do not fit; the message names the field, its value and the remedy.
    """
    cohort, count = config.cohort, config.devices.count
    if cohort.size > 1 and cohort.size != int(cohort.size):
        raise ConfigError(
            f"cohort.size={cohort.size:g} is neither a whole number nor a fraction below 1: write "
            "50, or 0.1"
        )
    most = places(config)
    for field, value, limit, what in (
        ("size", most, count, f"devices.count={count}"),
        ("min_devices", cohort.min_devices, count, f"devices.count={count}"),
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
    if cohort.script and not pathlib.Path(cohort.script).is_file():
        raise ConfigError(f"cohort.script={cohort.script!r}: there is no such file")
    if config.run.nonfinite == "drop" and not may_lose(config):
        raise ConfigError(
            "run.nonfinite=drop leaves a device out of a round, and cohort.quorum=0 needs all of "
            "them: set cohort.quorum"
        )
