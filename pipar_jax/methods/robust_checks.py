"""Checks of Byzantine-robust rules of aggregation, and of bounds of updates."""

from __future__ import annotations

from pipar_jax.aggregation.rules import COMBINATIONS, MULTI_KRUM
from pipar_jax.config import Config, quorum
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import Method

#: Rules that are told how many devices may lie, and how many more devices than twice that they
#: need.
LIARS = {"trimmed_mean": 1, MULTI_KRUM: 3}


def check_robust(config: Config, method: Method | None) -> None:
    """Checks what robust rules need.

    Args:
      config: A configuration that fits otherwise.
      method: Its method; None if the tuner chooses it.

    Raises:
      ConfigError: A field is not valid, has no effect, or contradicts another.
    """
    aggregation = config.aggregation
    rule, liars = aggregation.rule, aggregation.liars
    if bool(liars) != (rule in LIARS):
        raise ConfigError(
            f"aggregation.liars={liars} and aggregation.rule={rule!r} do not fit: "
            f"{' and '.join(LIARS)} need the number of devices that may lie, other rules do not "
            "take it"
        )
    finish = quorum(config.cohort, config.devices.count)
    if rule in LIARS and finish < 2 * liars + LIARS[rule]:
        raise ConfigError(
            f"aggregation.rule={rule} with aggregation.liars={liars} needs at least "
            f"{2 * liars + LIARS[rule]} devices that finish a round, got {finish}: lower liars, or "
            "raise devices.count or cohort.quorum"
        )
    whole = rule == MULTI_KRUM or aggregation.update_bound
    if whole and (method is None or method.cuts):
        field = f"rule={rule}" if rule == MULTI_KRUM else "update_bound"
        raise ConfigError(
            f"aggregation.{field} looks at whole updates, and with method={config.method} the "
            "server averages its own stages apart: use method=fl, or aggregation.rule=median"
        )
    robust = rule in COMBINATIONS or rule == MULTI_KRUM
    if robust and aggregation.weighted:
        raise ConfigError(
            f"aggregation.rule={rule} counts every device alike, since a liar would also lie about "
            "its samples: set aggregation.weighted=false"
        )
