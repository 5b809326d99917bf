"""A user's optax transformations and averages, whose errors and results are reported by name.

What they return is checked where it is used: while jax traces an update, its result is compared
with what an update has to be, and an exception names the function and its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stages.errors import StageError
from stages.foreign import describe
from stages.trees import PyTree
from stages.update import Joint


def checked_transformation(
    made: optax.GradientTransformation, what: str
) -> optax.GradientTransformation:
    """Returns a user's transformation, whose errors and results are reported by its name.

    Args:
      made: The transformation.
      what: Begins the messages.
    """

    def init(params: optax.Params) -> optax.OptState:
        with _reported(what):
            state = made.init(params)
        return jax.tree.map(lambda leaf: _array(leaf, what), state)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with _reported(what):
            given = made.update(updates, state, params)
        if not isinstance(given, tuple) or len(given) != 2:
            raise StageError(
                f"{what}: its update returned {_kind(given)}, expected (updates, state)"
            )
        new, after = given
        _check_alike(what, "updates", updates, new)
        _check_alike(what, "state", state, after)
        return _cast(new, updates), _cast(after, state)

    kind = Joint if isinstance(made, Joint) else optax.GradientTransformation
    return kind(init, update)


def checked_combination(
    combine: Callable[[PyTree, jax.Array], PyTree], what: str
) -> Callable[[PyTree, jax.Array], PyTree]:
    """Returns a user's function of stacked deltas, whose errors and results are reported.

    Args:
      combine: From deltas, {path: [replicas, …]}, and weights [replicas] to one delta,
        {path: […]}.
      what: Begins the messages.
    """

    def call(deltas: PyTree, weights: jax.Array) -> PyTree:
        with _reported(what):
            delta = combine(deltas, weights)
        like = jax.tree.map(lambda leaf: leaf[0], deltas)
        _check_alike(what, "delta", like, delta)
        return _cast(delta, like)

    return call


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turns any exception of a user's code into an error that names the code and its line."""
    try:
        yield
    except Exception as error:
        raise StageError(f"{what} failed: {describe(error)}") from error


def _array(leaf: Any, what: str) -> jax.Array:
    """Returns a leaf of a state as an array, which has to be able to travel between hosts."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(leaf, (bool, int, float, np.generic, np.ndarray, jax.Array)) or (
        dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
    ):
        raise StageError(
            f"{what}: its state has {_kind(leaf)} {dtype or ''}, expected arrays of numbers, which "
            "can be saved and moved to another host"
        )
    return jnp.asarray(leaf)


def _check_alike(what: str, name: str, wanted: PyTree, given: PyTree) -> None:
    """Checks that a result has the structure and the shapes that it has to have."""
    before: jax.tree_util.PyTreeDef = jax.tree.structure(wanted)
    after: jax.tree_util.PyTreeDef = jax.tree.structure(given)
    if before != after:
        raise StageError(
            f"{what}: its {name} came back as {str(after)[:200]}, expected {str(before)[:200]}"
        )
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True)
    for old, new in pairs:
        kept = jnp.can_cast(jnp.result_type(new), jnp.result_type(old), casting="same_kind")
        if jnp.shape(old) != jnp.shape(new) or not kept:
            raise StageError(
                f"{what}: its {name} came back with {_shape(new)}, expected {_shape(old)}"
                f"{'' if kept else ': a fraction would be lost; begin with 0.0 instead of 0'}"
            )


def _cast(given: PyTree, like: PyTree) -> PyTree:
    """Returns arrays in the dtypes of others, so that a step compiles once."""
    return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), given, like)


def _shape(leaf: Any) -> str:
    array = jnp.asarray(leaf)
    return f"{array.dtype}{list(array.shape)}"


def _kind(made: Any) -> str:
    return f"a {type(made).__name__}"
