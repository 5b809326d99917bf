"""Checks of a whole configuration, including the plan of its method."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pipar_jax.config import checks, paths, schema
from pipar_jax.config.fields import Config
from pipar_jax.config.plugins import read_args
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods.checks import check_registered
from pipar_jax.methods.names import NAMES
from pipar_jax.methods.registry import is_planned, plan_for
from pipar_jax.schedule.feasibility import check_adaptable, check_executable
from stages.names import UNITS, units_of


def resolve(config: Config, *, models: tuple[str, ...] = (), reads_data: bool = True) -> Config:
    """Checks a configuration as a whole and returns a complete copy.

    Numbers in float fields become floats, paths become absolute, a token in a file or the
    environment is read, and overrides are checked.

    Args:
      config: The configuration, which is not modified.
      models: Names of models beyond those that ``stages`` registers.
      reads_data: Whether hosts read ``data.source``, and are not passed their data by a program.

    Raises:
      ConfigError: A field is not valid; the message names it, its value and a remedy.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"expected a pipar_jax.Config, got {type(config).__name__} {config!r:.80}: create "
            "one, or use get_config() of a preset"
        )
    made = copy.deepcopy(config)
    schema.check(made, names=NAMES)
    made.devices.overrides = checks.fit_overrides(made, "devices")
    made.nodes.overrides = checks.fit_overrides(made, "nodes")
    paths.expand_all(made)
    made.network.token = checks.read_token(made.network.token)
    checks.check_whole(made)
    check_registered(made, models, reads_data=reads_data)
    if made.model.name in UNITS and made.model.name not in models:
        check_plan(made, units_of(made.model.name, read_args(made.model.args)))
    return made


def check_plan(config: Config, units: Sequence[str]) -> None:
    """Checks all cuts against the model's units, and that the runtime can execute the plan.

    Nothing is checked if the tuner or the planner has to choose the plan.

    Args:
      config: A configuration with valid fields.
      units: Names of the model's units, in order.

    Raises:
      ConfigError: A cut is not valid for this model, or the runtime cannot execute the plan.
    """
    if is_planned(config.method, config.pipeline):
        return
    plan = plan_for(config, units)
    try:
        check_executable(plan)
        if config.tuner.adapt:
            check_adaptable(plan)
    except PlanError as error:
        raise ConfigError(
            f"method={config.method} and pipeline.weights={config.pipeline.weights!r} cannot be "
            f"combined here: {error}"
        ) from error
