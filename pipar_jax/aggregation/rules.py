"""The rules of aggregation by name: the server's optimiser on the averaged update.

A rule is a function from its constants to an optax transformation of the pseudo-gradient. Nothing
here loads jax before a rule is made: launchers only need the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    import optax

    from pipar_jax.config import AggregationConfig


def _fedavg(config: AggregationConfig) -> optax.GradientTransformation:
    """FedAvg (McMahan et al., arXiv 1602.05629): the average itself, at step size 1."""
    return _scale(config)


def _fedavgm(config: AggregationConfig) -> optax.GradientTransformation:
    """FedAvgM (Hsu et al., arXiv 1909.06335): with momentum."""
    import optax

    return optax.chain(optax.trace(config.momentum), _scale(config))


def _fedadagrad(config: AggregationConfig) -> optax.GradientTransformation:
    """FedAdagrad (Reddi et al., arXiv 2003.00295): v + g²."""
    return _adaptive(config, lambda v, g2: v + g2)


def _fedadam(config: AggregationConfig) -> optax.GradientTransformation:
    """FedAdam (Reddi et al., arXiv 2003.00295): b2 v + (1 - b2) g²."""
    b2 = config.beta2
    return _adaptive(config, lambda v, g2: b2 * v + (1 - b2) * g2)


def _fedyogi(config: AggregationConfig) -> optax.GradientTransformation:
    """FedYogi (Reddi et al., arXiv 2003.00295): v - (1 - b2) g² sign(v - g²)."""
    import jax.numpy as jnp

    b2 = config.beta2
    return _adaptive(config, lambda v, g2: v - (1 - b2) * g2 * jnp.sign(v - g2))


#: Every rule by name.
RULES: dict[str, Callable[[AggregationConfig], optax.GradientTransformation]] = {
    "fedavg": _fedavg,
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
    "fedyogi": _fedyogi,
    "fedadagrad": _fedadagrad,
}


def rule(config: AggregationConfig) -> optax.GradientTransformation:
    """Returns the server's optimiser on the pseudo-gradient.

    Args:
      config: Its name and constants.
    """
    return RULES[config.rule](config)


def _scale(config: AggregationConfig) -> optax.GradientTransformation:
    import optax

    return optax.scale(-config.learning_rate)


def _adaptive(
    config: AggregationConfig, second_moment: Callable[[jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Returns an adaptive rule; see ``adaptive.scale_adaptively``."""
    import optax

    from pipar_jax.aggregation.adaptive import scale_adaptively

    return optax.chain(
        scale_adaptively(second_moment, config.momentum, config.epsilon), _scale(config)
    )
