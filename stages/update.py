"""Optimiser updates, unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from stages.model import Variables

OptState: TypeAlias = dict[str, Any]
Update: TypeAlias = Callable[
    [Variables, OptState, Variables], tuple[Variables, OptState, Variables]
]


def init_opt_state(tx: optax.GradientTransformation, params: Variables) -> OptState:
    """Returns {unit: optimiser state of the unit}, so that a unit can move with its own."""
    return {unit: jax.jit(tx.init)(arrays) for unit, arrays in params.items()}


def make_update(tx: optax.GradientTransformation) -> Update:
    """Returns the compiled optimiser step of a mini-batch.

    Args:
      tx: an optax transformation; it is applied to each unit by itself, so transformations
        that look at all parameters at once (clipping by global norm) see one unit at a time.

    Returns:
      update(params, opt_state, accumulated) -> (params, opt_state, zeroed accumulator); all
      three arguments are donated.
    """

    def update(
        params: Variables, opt_state: OptState, accumulated: Variables
    ) -> tuple[Variables, OptState, Variables]:
        new_params: Variables = {}
        new_state: OptState = {}
        for unit, arrays in params.items():
            updates, new_state[unit] = tx.update(accumulated[unit], opt_state[unit], arrays)
            new_params[unit] = dict(optax.apply_updates(arrays, updates))
        return new_params, new_state, jax.tree.map(jnp.zeros_like, accumulated)

    return jax.jit(update, donate_argnums=(0, 1, 2))
