"""The rules of aggregation by name: the server's optimiser on the averaged update.

A rule is a function from its constants to an optax transformation of the pseudo-gradient. Nothing
here loads jax before a rule is made: launchers only need the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pipar_jax.config.plugins import is_own, make
from pipar_jax.errors import RunError

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


#: Fields that a user's own rule is given where it has parameters of these names.
FACTS = ("learning_rate", "momentum", "beta2", "epsilon")
#: Every rule by name.
RULES: dict[str, Callable[[AggregationConfig], optax.GradientTransformation]] = {
    "fedavg": _fedavg,
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
    "fedyogi": _fedyogi,
    "fedadagrad": _fedadagrad,
}


def _median(config: AggregationConfig) -> Combine:
    """Coordinate-wise median (Yin et al., arXiv 1803.01498): tolerates up to almost half liars."""
    import jax.numpy as jnp

    del config
    return lambda deltas, _: {name: jnp.median(one, axis=0) for name, one in deltas.items()}


def _trimmed_mean(config: AggregationConfig) -> Combine:
    """Coordinate-wise mean without the largest and smallest ``liars`` (arXiv 1803.01498)."""
    import jax.numpy as jnp

    liars = config.liars

    def combine(deltas: Mapping[str, jax.Array], weights: jax.Array) -> Mapping[str, jax.Array]:
        count = weights.shape[0]
        if count <= 2 * liars:
            raise RunError(
                f"aggregation.rule=trimmed_mean with aggregation.liars={liars} needs more than "
                f"{2 * liars} devices that hold a unit, got {count}: lower liars, or raise "
                "cohort.quorum"
            )
        kept = slice(liars, count - liars)
        return {name: jnp.mean(jnp.sort(one, axis=0)[kept], axis=0) for name, one in deltas.items()}

    return combine


#: From the devices' deltas, {path: [replicas, …]}, and their weights [replicas] to one delta.
Combine: TypeAlias = Callable[[Mapping[str, "jax.Array"], "jax.Array"], Mapping[str, "jax.Array"]]


#: The rules that take the place of the weighted mean: every device counts alike.
COMBINATIONS: dict[str, Callable[[AggregationConfig], Combine]] = {
    "median": _median,
    "trimmed_mean": _trimmed_mean,
}
#: The mean of those updates that are nearest to each other (``runtime.update_transforms``).
MULTI_KRUM = "multi_krum"
#: All registered names.
RULE_NAMES = (*RULES, *COMBINATIONS, MULTI_KRUM)


class ServerRule(NamedTuple):
    """How the replicas of a unit become its global weights.

    Attributes:
      transformation: The server's optimiser on the pseudo-gradient.
      combine: What takes the place of the weighted mean; None: the mean.
    """

    transformation: optax.GradientTransformation
    combine: Combine | None = None


def make_rule(config: AggregationConfig) -> ServerRule:
    """Returns the configured rule.

    The user's own function is called with ``aggregation.args`` and, where it has parameters of
    these names, with the fields of ``FACTS``. It returns an optax transformation of the
    pseudo-gradient, or a function of the deltas of a unit's weights {path: [replicas, …]} (replica
    minus global weights) and the replicas' weights [replicas] (their sum is 1) to one delta, which
    is multiplied by ``aggregation.learning_rate``.

    Args:
      config: Its name and constants.

    Raises:
      RunError: The user's own function cannot be found, fails, or returns something else.
    """
    if config.rule in COMBINATIONS:
        return ServerRule(_scale(config), COMBINATIONS[config.rule](config))
    if config.rule == MULTI_KRUM:  # the mean of what its transform leaves over
        return ServerRule(_scale(config))
    if not is_own(config.rule):
        return ServerRule(RULES[config.rule](config))
    from stages.foreign_updates import checked_combination, checked_transformation

    what = f"own rule {config.rule}"
    facts = {name: getattr(config, name) for name in FACTS}
    made = make(
        config.rule, what, RunError, args=config.args, field="aggregation.args", facts=facts
    )
    if callable(getattr(made, "init", None)) and callable(getattr(made, "update", None)):
        return ServerRule(checked_transformation(made, what))
    if not callable(made):
        raise RunError(
            f"{what} returned a {type(made).__name__}, expected an optax.GradientTransformation or "
            "a function of (deltas, weights)"
        )
    return ServerRule(_scale(config), checked_combination(made, what))


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
