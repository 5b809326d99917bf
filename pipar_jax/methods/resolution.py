"""A configuration checked as a whole, the plan that its method makes of it included."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pipar_jax.config import checks, paths, schema
from pipar_jax.config.fields import Config
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods.checks import check_registered
from pipar_jax.methods.names import NAMES
from pipar_jax.methods.registry import is_planned, plan_for
from pipar_jax.schedule.feasibility import check_adaptable, check_executable
from stages.names import UNITS


def resolve(config: Config, *, models: tuple[str, ...] = ()) -> Config:
    """Checks a configuration as a whole and returns a complete copy.

    Numbers become floats where the field is one, paths become absolute, a token kept elsewhere is
    read, and overrides are checked device by device.

    Args:
      config: What a preset or a caller made; not changed.
      models: Names of models beyond those that ``stages`` registers.

    Raises:
      ConfigError: A field cannot work; the message names it, its value and the remedy.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"expected a pipar_jax.Config, got {type(config).__name__} {config!r:.80}: make "
            "one, or take a preset's get_config()"
        )
    made = copy.deepcopy(config)
    schema.check(made, names=NAMES)
    made.devices.overrides = checks.fit_overrides(made, "devices")
    made.nodes.overrides = checks.fit_overrides(made, "nodes")
    paths.expand_all(made)
    made.network.token = checks.read_token(made.network.token)
    checks.check_whole(made)
    check_registered(made, models)
    if (units := UNITS.get(made.model.name)) is not None and made.model.name not in models:
        check_plan(made, units)
    return made


def check_plan(config: Config, units: Sequence[str]) -> None:
    """Checks what depends on the model's units: every cut, and that hosts can do what follows.

    Nothing is checked where the plan is the tuner's or the planner's to find.

    Args:
      config: A configuration whose fields fit one by one.
      units: Names of the model's units, in order.

    Raises:
      ConfigError: A cut is not one of this model, or no host could carry the plan out.
    """
    if is_planned(config):
        return
    plan = plan_for(config, units)
    try:
        check_executable(plan)
        if config.tuner.adapt:
            check_adaptable(plan)
    except PlanError as error:
        raise ConfigError(
            f"method={config.method} and pipeline.weights={config.pipeline.weights!r} do not go "
            f"together here: {error}"
        ) from error
