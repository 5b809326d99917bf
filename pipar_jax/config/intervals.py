"""The aggregation interval."""

from __future__ import annotations

import re

from pipar_jax.config.training_fields import AggregationConfig
from pipar_jax.errors import ConfigError


def aggregate_steps(config: AggregationConfig) -> int:
    """Returns the number of steps between two aggregations; 0 means once per epoch.

    Raises:
      ConfigError: ``aggregation.every`` is neither ``epoch`` nor a number of steps.
    """
    every = config.every.strip()
    if every == "epoch":
        return 0
    match = re.fullmatch(r"(\d{1,9})( steps?)?", every, re.ASCII)
    if match is None or int(match[1]) < 1:
        raise ConfigError(
            f"aggregation.every={config.every[:99]!r} is not valid: expected epoch, "
            "or a number of steps such as '10 steps'"
        )
    return int(match[1])
