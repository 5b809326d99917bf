"""What the fields of ``optimizer`` have to be, and the groups of weights that they name."""

from __future__ import annotations

import math
import re
import shlex
from typing import NamedTuple

from pipar_jax.config.plugins import check_args, check_named
from pipar_jax.config.training_fields import OPTIMIZERS, SCHEDULES, OptimizerConfig
from pipar_jax.errors import ConfigError


class Group(NamedTuple):
    """Weights with a learning rate of their own.

    Attributes:
      pattern: Regular expression that is searched in "unit/path".
      factor: Multiplies the learning rate.
    """

    pattern: str
    factor: float


def check_optimizer(config: OptimizerConfig) -> None:
    """Checks what types and bounds of single fields cannot express.

    Raises:
      ConfigError: A field is not valid.
    """
    check_named(config.name, "optimizer.name", "an optimiser", OPTIMIZERS)
    check_args(config.args, "optimizer.args", "optimizer.name", config.name)
    check_named(config.schedule, "optimizer.schedule", "a schedule", SCHEDULES)
    check_args(
        config.schedule_args, "optimizer.schedule_args", "optimizer.schedule", config.schedule
    )
    read_groups(config.groups)


def read_groups(text: str) -> tuple[Group, ...]:
    """Reads ``optimizer.groups``: "head=0.1 lora=10" gives two groups, in this order.

    Args:
      text: Pairs PATTERN=FACTOR, separated by blanks.

    Raises:
      ConfigError: A pair has not this form.
    """
    said = f"optimizer.groups={text[:120]!r}"
    try:
        pairs = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{said} cannot be read: {error}") from error
    groups = []
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{said}: {pattern[:80]!r} is not a regular expression: {str(error)[:120]}"
            ) from error
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 <= factor < math.inf:
            raise ConfigError(
                f"{said}: {pair[:80]!r} is not PATTERN=FACTOR with a factor of at least 0; write "
                "'head=0.1 lora=10'"
            )
        groups.append(Group(pattern, factor))
    return tuple(groups)
