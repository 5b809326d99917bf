"""The adaptive steps of a server's optimiser: FedAdagrad, FedAdam and FedYogi."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdaptiveState(NamedTuple):
    """First and second moment of the pseudo-gradient."""

    mean: optax.Updates
    square: optax.Updates


def scale_adaptively(
    second_moment: Callable[[jax.Array, jax.Array], jax.Array], b1: float, epsilon: float
) -> optax.GradientTransformation:
    """Returns the adaptive step of arXiv 2003.00295, algorithm 2: m / (sqrt(v) + epsilon).

    Unlike Adam of optax it corrects no bias; v starts at epsilon squared, as the paper advises.

    Args:
      second_moment: From v and the squared pseudo-gradient to the new v.
      b1: Decay of the first moment.
      epsilon: The paper's tau, its degree of adaptivity.
    """

    def init(params: optax.Params) -> AdaptiveState:
        return AdaptiveState(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda w: jnp.full_like(w, epsilon**2), params),
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, AdaptiveState)
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: second_moment(v, g * g), state.square, updates)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square)
        return step, AdaptiveState(mean, square)

    return optax.GradientTransformation(init, update)
