"""Averaging the replicas of a unit: a family of optax transformations on the pseudo-gradient.

The server's optimiser sees w - mean(w_d) as a gradient (Reddi et al., Adaptive Federated
Optimization, arXiv 2003.00295, algorithm 2), so FedAvg is SGD with step size 1. Weights are
averaged unit by unit over whoever holds the unit, so devices with different cuts aggregate
naturally. Batch statistics take the weighted mean and never pass through the optimiser; what has
no mean (counters, masks, keys: integers and booleans) is the first device's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pipar_jax.config import AggregationConfig

Arrays = dict[str, jax.Array]
Variables = dict[str, Arrays]


class AdaptiveState(NamedTuple):
    """First and second moment of the pseudo-gradient."""

    mean: optax.Updates
    square: optax.Updates


def scale_adaptively(
    second_moment: Callable[[Any, Any], Any], b1: float, epsilon: float
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


def rule(config: AggregationConfig) -> optax.GradientTransformation:
    """Returns the server's optimiser on the pseudo-gradient.

    Args:
      config: Its name and constants. FedAvgM is Hsu et al., arXiv 1909.06335.
    """
    b1, b2, epsilon = config.momentum, config.beta2, config.epsilon
    scale = optax.scale(-config.learning_rate)
    if config.rule == "fedavg":
        return scale
    if config.rule == "fedavgm":
        return optax.chain(optax.trace(b1), scale)
    moments: Mapping[str, Callable[[Any, Any], Any]] = {
        "fedadagrad": lambda v, g2: v + g2,
        "fedadam": lambda v, g2: b2 * v + (1 - b2) * g2,
        "fedyogi": lambda v, g2: v - (1 - b2) * g2 * jnp.sign(v - g2),
    }
    return optax.chain(scale_adaptively(moments[config.rule], b1, epsilon), scale)


class Replica(NamedTuple):
    """What one device brings to the average, for the units it (or its server part) holds.

    Attributes:
      params: For each unit its weights.
      state: For each unit its batch statistics.
      weight: The share it has in the average, usually the samples it trained on.
    """

    params: Variables
    state: Variables
    weight: float


@functools.lru_cache(maxsize=16)
def _compiled(fields: tuple[Any, ...]) -> tuple[optax.GradientTransformation, Any]:
    """Returns a rule and its compiled average, once per rule and process."""
    transformation = rule(AggregationConfig(*fields))

    def combine(
        old: Any, opt_state: Any, replicas: Sequence[tuple[Any, Any]], weights: Any
    ) -> tuple[Any, Any, Any]:
        shares = weights / jnp.sum(weights)
        # Devices are summed in their order, never in that of arrival: a run repeats exactly.
        mean = jax.tree.map(lambda *some: _mean(shares, some), *(one[0] for one in replicas))
        state = jax.tree.map(lambda *some: _mean(shares, some), *(one[1] for one in replicas))
        pseudo_gradient = jax.tree.map(jnp.subtract, old, mean)
        updates, opt_state = transformation.update(pseudo_gradient, opt_state, old)
        return optax.apply_updates(old, updates), opt_state, state

    jitted = jax.jit(combine)

    def run(old: Any, opt_state: Any, replicas: Any, weights: Any) -> tuple[Any, Any, Any]:
        params, opt_state, state = jitted(old, opt_state, replicas, weights)
        if state and len(replicas) > 1:
            state = _unmixed(state, [own for _, own in replicas])
        return params, opt_state, state

    return transformation, run


def _mean(shares: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns the weighted mean of arrays in their dtype, summed in at least float32.

    Integers and booleans have none: the first array it is.
    """
    dtype = leaves[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return leaves[0]
    wide = jnp.promote_types(dtype, jnp.float32)
    total: Any = sum(
        s.astype(wide) * leaf.astype(wide) for s, leaf in zip(shares, leaves, strict=True)
    )
    mean: jax.Array = total.astype(dtype)
    return mean


@jax.jit
def _unmixed(mean: Arrays, replicas: Sequence[Arrays]) -> Arrays:
    """Returns statistics with the replicas' own values where these are equal: no rounding there.

    A constant that a network keeps would otherwise drift with each round. It is a program of its
    own since the mean would be rounded in another way if it were compiled with this.
    """

    def pick(mean: jax.Array, *leaves: jax.Array) -> jax.Array:
        equal = functools.reduce(jnp.logical_and, (leaf == leaves[0] for leaf in leaves))
        return jnp.where(equal, leaves[0], mean)

    picked: Arrays = jax.tree.map(pick, mean, *replicas)
    return picked


class Aggregator:
    """The global weights of some units and the server's optimiser over them.

    Attributes:
      params: For each unit its global weights.
      state: For each unit its batch statistics.
      rule_state: For each unit the state of the server's optimiser.

    Args:
      config: The rule; see ``rule``.
      params: Global weights of the units to begin with.
      state: Their batch statistics.
    """

    def __init__(self, config: AggregationConfig, params: Variables, state: Variables) -> None:
        self.params = params
        self.state = state
        transformation, self._combine = _compiled(dataclasses.astuple(config))
        self.rule_state = {unit: transformation.init(w) for unit, w in params.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the global weights, the batch statistics and the rule's state."""
        leaves = jax.tree.leaves((self.params, self.state, self.rule_state))
        return sum(leaf.nbytes for leaf in leaves)

    def compile(self, holders: Mapping[str, int]) -> None:
        """Compiles the average of every unit before the first round.

        Args:
          holders: For each unit how many replicas of it there will be.
        """
        for unit, count in holders.items():
            own = self.params[unit], self.state[unit]
            weights = jnp.ones(count, _share_dtype(own[0]))
            self._combine(own[0], self.rule_state[unit], [own] * count, weights)

    def broken_units(self) -> tuple[str, ...]:
        """Returns the units whose global weights, statistics or rule's state are not finite."""
        return broken_units(self.params, self.params, self.state, self.rule_state)

    def aggregate(self, replicas: Sequence[Replica]) -> None:
        """Averages replicas, in the order given, into the global weights.

        Args:
          replicas: What each device brings; a unit that no replica holds stays as it is.
        """
        for unit in self.params:
            holders = [one for one in replicas if unit in one.params]
            if not holders:
                continue
            dtype = _share_dtype(self.params[unit])
            weights = jnp.asarray([one.weight for one in holders], dtype)
            self.params[unit], self.rule_state[unit], self.state[unit] = self._combine(
                self.params[unit],
                self.rule_state[unit],
                [(one.params[unit], one.state[unit]) for one in holders],
                weights,
            )
        jax.block_until_ready((self.params, self.state))  # type: ignore[no-untyped-call]


def _share_dtype(params: Mapping[str, jax.Array]) -> Any:
    """Returns the dtype of the devices' shares: at least float32, as wide as the weights."""
    return jnp.result_type(*jax.tree.leaves(params), jnp.float32)


def broken_units(units: Iterable[str], *parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the units of which a number is not finite.

    Args:
      units: Their names.
      *parts: Weights, batch statistics, states of optimisers: each a tree for each unit, where a
        unit that has none of a part may be missing.
    """
    names = list(units)
    flags = np.asarray(_finite([[part.get(unit) for part in parts] for unit in names]))
    return tuple(unit for unit, good in zip(names, flags, strict=True) if not good)


@jax.jit
def _finite(units: Sequence[Any]) -> jax.Array:
    """Returns for each of some trees whether all its numbers are finite, [units] bool."""
    return jnp.array([
        jnp.all(jnp.array([
            jnp.all(jnp.isfinite(leaf))
            for leaf in jax.tree.leaves(unit)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ], bool))
        for unit in units
    ], bool)  # fmt: skip
