"""The user's own optimisers and learning-rate schedules, ``module:NAME:FUNCTION``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pipar_jax.config import OptimizerConfig
from pipar_jax.config.plugins import guarded, make
from pipar_jax.errors import RunError
from stages.foreign_updates import checked_transformation

#: Fields whose values an optimiser's function is given if it has parameters of these names.
FACTS = ("momentum", "nesterov", "beta2", "epsilon", "weight_decay")


def optimizer(
    config: OptimizerConfig, rate: optax.ScalarOrSchedule, steps: int
) -> list[optax.GradientTransformation]:
    """Returns the user's own optimiser.

    Its function is called with ``learning_rate``, with ``optimizer.args`` and, where it has
    parameters of these names, with ``steps`` and the fields of ``FACTS``. It returns an optax
    transformation that includes the step by the learning rate, or a list of them to be chained.
    Each is applied to each unit separately, except ``stages.Joint`` ones.

    Args:
      config: The optimiser's configuration.
      rate: The learning rate, or its schedule.
      steps: Number of steps of a replica in the run.

    Raises:
      RunError: The function cannot be found, fails, or returns something else.
    """
    what = f"own optimiser {config.name}"
    changed = [name for name in FACTS if getattr(config, name) != getattr(OptimizerConfig(), name)]
    made = make(
        config.name, what, RunError, args=config.args, field="optimizer.args",
        facts={"learning_rate": rate, "steps": steps,
               **{name: getattr(config, name) for name in FACTS}},
        required=("learning_rate", *changed),
    )  # fmt: skip
    parts = [made] if _is_transformation(made) else made
    if not isinstance(parts, (list, tuple)) or not all(map(_is_transformation, parts)):
        raise RunError(
            f"{what} returned {_kind(made)}, expected an optax.GradientTransformation, or a list "
            "of them"
        )
    return [checked_transformation(part, what) for part in parts]


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the user's own learning-rate schedule.

    Its function is called with ``learning_rate`` (a number), ``optimizer.schedule_args`` and, where
    it has a parameter of this name, ``steps``. It returns a function from the number of steps taken
    to the learning rate, as optax's schedules are.

    Args:
      config: The optimiser's configuration.
      steps: Steps of the run after the warm-up.

    Raises:
      RunError: The function cannot be found, fails, or returns something else.
    """
    what = f"own schedule {config.schedule}"
    made = make(
        config.schedule, what, RunError, args=config.schedule_args,
        field="optimizer.schedule_args",
        facts={"learning_rate": config.learning_rate, "steps": steps},
        required=("learning_rate",),
    )  # fmt: skip
    if not callable(made):
        raise RunError(
            f"{what} returned {_kind(made)}, expected a function from the number of steps taken to "
            "the learning rate"
        )

    def course(count: jax.Array) -> jax.Array:
        with guarded(f"{what} failed", RunError):
            rate = jnp.asarray(made(count))
        if rate.shape or not jnp.issubdtype(rate.dtype, jnp.floating):
            raise RunError(f"{what} gives {_shape(rate)} as learning rate, expected one number")
        return rate

    with jax.ensure_compile_time_eval():
        course(jnp.zeros((), jnp.int32))  # so that a mistake is reported before the first step
    return course


def _is_transformation(made: Any) -> bool:
    """Returns whether an object is an optax transformation."""
    return callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))


def _shape(leaf: Any) -> str:
    array = jnp.asarray(leaf)
    return f"{array.dtype}{list(array.shape)}"


def _kind(made: Any) -> str:
    return f"a {type(made).__name__}"
