"""Averaging the replicas of a unit: a family of optax transformations on the pseudo-gradient.

The server's optimiser sees w - mean(w_d) as a gradient (Reddi et al., Adaptive Federated
Optimization, arXiv 2003.00295, algorithm 2), so FedAvg is SGD with step size 1. Weights are
averaged unit by unit over the holders of the unit, so devices with different cuts aggregate
naturally. Batch statistics take the weighted mean and bypass the optimiser; arrays without a
mean (counters, masks, keys: integers and booleans) are the first device's.
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

from comms.arrays import Array
from pipar_jax.aggregation.rules import RULES, make_rule
from pipar_jax.config import AggregationConfig
from stages.trees import PyTree

Arrays = dict[str, jax.Array]
Variables = dict[str, Arrays]
#: Arrays of at most so many numbers are averaged together as one vector: a program takes 20 ms to
#: compile for each of its arrays, a copy of this size some 20 µs.
SMALL = 1 << 16


class Contribution(NamedTuple):
    """A device's contribution to the average, for the units it (or its server part) holds.

    Attributes:
      params: For each unit its weights.
      state: For each unit its batch statistics.
      weight: Its weight in the average, usually the number of samples it trained on.
    """

    params: Variables
    state: Variables
    weight: float


class _Compiled(NamedTuple):
    """A rule, compiled.

    Attributes:
      transformation: The server's optimiser.
      step: Its step from a mean.
      elementwise: Whether it takes each number by itself.
      step_of_all: The step from all replicas and their shares, of a rule without a mean; compiled
        once for each number of replicas.
    """

    transformation: optax.GradientTransformation
    step: Any
    elementwise: bool
    step_of_all: Any = None


@functools.lru_cache(maxsize=16)
def _compiled(fields: tuple[Any, ...]) -> _Compiled:
    """Returns a rule and its compiled steps, once per rule and process."""
    config = AggregationConfig(*fields)
    transformation, combine = make_rule(config)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(old: Arrays, opt_state: PyTree, mean: Arrays) -> tuple[PyTree, PyTree]:
        pseudo_gradient = jax.tree.map(jnp.subtract, old, mean)
        updates, opt_state = transformation.update(pseudo_gradient, opt_state, old)
        return optax.apply_updates(old, updates), opt_state

    if combine is None:
        return _Compiled(transformation, step, config.rule in RULES)

    @jax.jit
    def step_of_all(
        old: Arrays, opt_state: PyTree, replicas: Sequence[Arrays], shares: jax.Array
    ) -> tuple[PyTree, PyTree]:
        wide = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), (old, tuple(replicas)))
        deltas = jax.tree.map(lambda o, *some: jnp.stack([w - o for w in some]), wide[0], *wide[1])
        delta = combine(deltas, shares)
        pseudo_gradient = jax.tree.map(lambda d, o: (-d).astype(o.dtype), delta, old)
        updates, opt_state = transformation.update(pseudo_gradient, opt_state, old)
        return optax.apply_updates(old, updates), opt_state

    return _Compiled(transformation, step, False, step_of_all)


def _averaged(leaf: jax.Array) -> bool:
    """Returns whether an array has a mean; integers and booleans have none."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _wide(leaf: jax.Array) -> PyTree:
    """Returns the dtype in which an array is summed: at least float32."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _packed(arrays: Mapping[str, Any]) -> Arrays:
    """Returns arrays with the small ones of each dtype as one vector, under a name of its own."""
    found: dict[str, Any] = {}
    together: dict[str, list[Array]] = {}
    for path in sorted(arrays):
        leaf = arrays[path]
        if (name := _vector(leaf)) is None:
            found[path] = leaf
        else:
            together.setdefault(name, []).append(np.ravel(np.asarray(leaf)))
    return found | {name: np.concatenate(some) for name, some in together.items()}


def _unpacked(packed: Mapping[str, jax.Array], like: Mapping[str, Any]) -> Arrays:
    """Returns what ``_packed`` packed, with the shapes of other arrays."""
    found: dict[str, Any] = {}
    vectors: dict[str, Array] = {}
    for path in sorted(like):
        leaf = like[path]
        if (name := _vector(leaf)) is None:
            found[path] = packed[path]
            continue
        vector = vectors[name] if name in vectors else np.asarray(packed[name])
        found[path], vectors[name] = vector[: leaf.size].reshape(leaf.shape), vector[leaf.size :]
    arrays: Arrays = jax.device_put(found)
    return arrays


def _vector(leaf: Any) -> str | None:
    """Returns the name of the vector that an array is packed into; None if it is by itself."""
    # No path of an array begins with a slash.
    return f"/{leaf.dtype}" if leaf.size <= SMALL and _averaged(leaf) else None


def _by_vectors(function: Callable[..., jax.Array], *trees: Mapping[str, Any]) -> Arrays:
    """Returns what a function makes of the arrays under each path of some trees, one after another.

    No more than one array's intermediate results are in memory at a time.

    Args:
      function: Takes each number by itself, so that small arrays go together as one vector.
      *trees: Arrays by path; the results are shaped like those of the first.
    """
    packed = [_packed(tree) for tree in trees]
    found = {path: function(*(one[path] for one in packed)) for path in packed[0]}
    return _unpacked(found, trees[0])


@jax.jit
def _begin(share: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns the sum over a single replica: its array times its share."""
    wide = _wide(leaf)
    return share.astype(wide) * leaf.astype(wide)


@functools.partial(jax.jit, donate_argnums=0)
def _fold(total: jax.Array, share: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns a sum with a further replica: the step of the average, for any number of them."""
    wide = _wide(leaf)
    return total + share.astype(wide) * leaf.astype(wide)


def _average(leaves: Sequence[jax.Array], shares: Array) -> jax.Array:
    """Returns the weighted mean of replicas of an array in its dtype; the first if it has no mean.

    Replicas are summed in their order, not in order of arrival, so that a run is reproducible;
    only the first two are swapped. A compiled program contracts a product and a sum into one
    rounding; this way the sum has the bits of a single program over all replicas.
    """
    if not _averaged(leaves[0]):
        return leaves[0]
    first, *others = [1, 0, *range(2, len(leaves))] if len(leaves) > 1 else [0]
    total = _begin(shares[first], leaves[first])
    for i in others:
        total = _fold(total, shares[i], leaves[i])
    mean: jax.Array = total.astype(leaves[0].dtype)
    return mean


def _unmixed(mean: jax.Array, *replicas: Array | jax.Array) -> jax.Array:
    """Returns a statistic with the replicas' own values, unrounded, where these are equal.

    A constant that a network keeps would otherwise drift with each round. Statistics are small: a
    program for all of a unit's would take longer to compile than many rounds.
    """
    first, *others = map(np.asarray, replicas)
    alike = np.logical_and.reduce([first == other for other in others])
    return jnp.asarray(np.where(alike, first, mean))


def _shares(weights: Sequence[float], dtype: Any) -> Array:
    """Returns each replica's share of the average, [replicas]."""
    of = np.asarray(weights, dtype)
    return np.asarray(of * (np.ones((), dtype) / np.sum(of)), dtype)


class Aggregator:
    """The global weights of some units and the server's optimiser over them.

    Attributes:
      params: For each unit its global weights.
      state: For each unit its batch statistics.
      rule_state: For each unit the state of the server's optimiser.

    Args:
      config: The rule; see ``make_rule``.
      params: Global weights of the units to begin with.
      state: Their batch statistics.
    """

    def __init__(self, config: AggregationConfig, params: Variables, state: Variables) -> None:
        self.params = params
        self.state = state
        self._least = 2 * config.liars + 1
        self._rule = _compiled(dataclasses.astuple(config))
        init = self._rule.transformation.init
        self.rule_state = {unit: init(w) for unit, w in params.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the global weights, the batch statistics and the rule's state."""
        leaves = jax.tree.leaves((self.params, self.state, self.rule_state))
        return sum(leaf.nbytes for leaf in leaves)

    def compile(self) -> None:
        """Compiles the average of every unit, for any number of replicas, before the first round.

        The weights do not change. A rule that takes all replicas at once is compiled for three of
        them here, or as many as it needs, and for other numbers when they come.
        """
        count = max(3, self._least)
        for unit in self.params:
            self._combine(unit, [(self.params[unit], self.state[unit])] * count, [1.0] * count)

    def broken_units(self) -> tuple[str, ...]:
        """Returns the units whose global weights, statistics or rule's state are not finite."""
        return broken_units(self.params, self.params, self.state, self.rule_state)

    def aggregate(self, replicas: Sequence[Contribution]) -> None:
        """Averages replicas, in the order given, into the global weights.

        Args:
          replicas: The devices' contributions; a unit that no replica holds stays unchanged.
        """
        for unit in self.params:
            holders = [one for one in replicas if unit in one.params]
            if holders:
                self.params[unit], self.rule_state[unit], self.state[unit] = self._combine(
                    unit,
                    [(one.params[unit], one.state[unit]) for one in holders],
                    [one.weight for one in holders],
                )
        jax.block_until_ready((self.params, self.state))  # type: ignore[no-untyped-call]

    def _combine(
        self, unit: str, replicas: Sequence[tuple[PyTree, PyTree]], weights: Sequence[float]
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Returns a unit's weights, its rule's state and its statistics after an average."""
        shares, rule = _shares(weights, _share_dtype(self.params[unit])), self._rule
        given, statistics = zip(*replicas, strict=True)

        def average(*leaves: jax.Array) -> jax.Array:
            return _average(leaves, shares)

        state = _by_vectors(average, *statistics)
        if len(replicas) > 1:
            state = jax.tree.map(_unmixed, state, *statistics)
        old, rule_state = self.params[unit], self.rule_state[unit]
        if rule.step_of_all is not None:
            return *rule.step_of_all(old, rule_state, given, shares), state
        if not rule.elementwise or jax.tree.leaves(rule_state):
            return *rule.step(old, rule_state, _by_vectors(average, *given)), state

        def step(own: jax.Array, *leaves: jax.Array) -> jax.Array:
            found, _ = rule.step({"": own}, rule_state, {"": average(*leaves)})
            new: jax.Array = found[""]
            return new

        return _by_vectors(step, old, *given), rule_state, state


def _share_dtype(params: Mapping[str, jax.Array]) -> PyTree:
    """Returns the dtype of the devices' shares: at least float32, as wide as the weights."""
    return jnp.result_type(*jax.tree.leaves(params), jnp.float32)


def broken_units(units: Iterable[str], *parts: Mapping[str, PyTree]) -> tuple[str, ...]:
    """Returns the names of the units with a non-finite number.

    Args:
      units: Their names.
      *parts: Weights, batch statistics, optimiser states: each a tree per unit, where a
        unit without the part may be missing.
    """
    # All are started before the first is waited for.
    found = [
        (unit, [_finite(leaf) for part in parts for leaf in jax.tree.leaves(part.get(unit))])
        for unit in units
    ]
    return tuple(unit for unit, flags in found if not all(flags))


def _finite(leaf: Array | jax.Array) -> bool | jax.Array:
    """Returns whether all numbers of an array are finite.

    One program over all arrays of a model would take XLA seconds to compile: 4.4 s for
    MobileNetV3-Small.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    if isinstance(leaf, jax.Array) and any(one.platform != "cpu" for one in leaf.devices()):
        found: jax.Array = _finite_there(leaf)
        return found
    numbers = np.asarray(leaf)
    with np.errstate(all="ignore"):
        # What is not finite stays so in a sum, which needs no memory; a sum may exceed the dtype.
        return bool(np.isfinite(np.sum(numbers)) or np.all(np.isfinite(numbers)))


@jax.jit
def _finite_there(leaf: jax.Array) -> jax.Array:
    """Returns whether all numbers of an array are finite, where the array is."""
    return jnp.all(jnp.isfinite(leaf))
