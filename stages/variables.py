"""The variables of a unit's module: weights, state, random streams.

* **Weights** are ``nnx.Param`` and its subclasses. They have gradients and optimiser state.
* **State** is everything else that holds an array: ``nnx.BatchStat``, other types of
  ``nnx.Variable``, arrays that are plain attributes. Its values after a call in training are kept.
  Aggregation takes the weighted mean of floating-point state, and the first device's integers and
  booleans.
* **Random streams** (``nnx.RngState``) are not state: each call starts new ones, see
  ``draw_streams``.
* **Sown values** (``nnx.Intermediate``, ``nnx.Perturbation``) are dropped after the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stages.context import Context
from stages.errors import StageError
from stages.micro_batch_context import name_hash
from stages.trees import Path, PyTree

FLOATS = frozenset(map(jnp.dtype, ("float16", "bfloat16", "float32", "float64")))
_WHOLE = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
DTYPES = FLOATS | frozenset(map(jnp.dtype, _WHOLE))


class Parts(NamedTuple):
    """The parts of a module.

    Attributes:
      graph: The static part (``nnx.GraphDef``).
      params: Weights by path.
      streams: Keys and counters of random streams by path.
      state: All other variables by path.
    """

    graph: Any
    params: dict[Path, PyTree]
    streams: dict[Path, PyTree]
    state: dict[Path, PyTree]


def divide(module: Any) -> Parts:
    """Splits a module; leaves are ``nnx.Variable`` or, where attributes are arrays, arrays."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                # Flax treats an array that is an attribute as data, but not while it is traced.
                if isinstance(value, jax.Array) and not nnx.is_data(value):
                    setattr(node, name, nnx.data(value))
    graph, *parts = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, streams, state = (dict(nnx.to_flat_state(part)) for part in parts)
    return Parts(graph, params, streams, state)


def value_of(leaf: Any) -> Any:
    """Returns the value of a leaf; numbers and arrays of numpy as jax would convert them."""
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        return jnp.asarray(value)
    return value


def text_of(path: Path) -> str:
    """Returns a path as text, "blocks/0/kernel"; parts of keys that are tuples are parts of it."""
    return "/".join(text_of(part) if isinstance(part, tuple) else str(part) for part in path)


def abstract(unit: str, leaves: Mapping[Path, PyTree]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each variable by path, as text.

    Args:
      unit: The unit's name, for messages.
      leaves: One part of the result of ``divide``.

    Raises:
      StageError: A variable has a type, shape or dtype that cannot be trained.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in leaves.items():
        name, value = text_of(path), value_of(leaf)
        where = f"unit {unit!r}: variable {name!r} of type {type(leaf).__name__}"
        if name in shapes:
            raise StageError(f"{where} has the name of another one: rename attributes or keys")
        _check_kind(where, leaf, value)
        shapes[name] = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            value.shape, value.dtype
        )
    return shapes


def nested(arrays: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[Any, Any]:
    """Turns {path as text: array} into the nested dictionary for ``nnx.merge``.

    Args:
      arrays: Arrays by path, as text.
      paths: The path of each text.
    """
    tree: dict[Any, Any] = {}
    for text, value in arrays.items():
        *parents, last = paths[text]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def draw_streams(
    streams: Mapping[str, jax.ShapeDtypeStruct], scope: Context
) -> dict[str, jax.Array]:
    """Creates a unit's random streams for one call.

    The key of a stream is the root seed folded with device, step, the unit's name, the stream's
    path and the position in the mini-batch of the micro-batch's first sample; at inference it is
    the same in every call. Counters start at 0. A run is therefore reproducible and independent of
    cuts, but draws depend on the number of micro-batches (those of ``stages.layers.Dropout`` do
    not).

    Args:
      streams: Abstract keys and counters by path.
      scope: The call.
    """
    drawn: dict[str, jax.Array] = {}
    for path, leaf in streams.items():
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            drawn[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        key = jax.random.fold_in(scope.key(), name_hash(path))
        if scope.train and scope.draw is not None:
            key = jax.random.fold_in(key, scope.draw.position)
        drawn[path] = jax.random.split(key, leaf.shape) if leaf.shape else key
    return drawn


def state_after(
    unit: str,
    left: Parts,
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array],
    free: tuple[Path, ...],
) -> dict[str, jax.Array]:
    """Returns the state after a call in training, with unchanged shapes and dtypes.

    Args:
      unit: The unit's name, for messages.
      left: The module after the call.
      params: Weights before the call by path.
      state: State before the call by path.
      free: Paths below which weights may be overwritten, since the next call starts with the old
        ones.

    Raises:
      StageError: The call created, removed or reshaped a variable, or wrote into a weight.
    """
    for path, leaf in {**left.params, **left.state, **left.streams}.items():
        name, kind = text_of(path), type(leaf).__name__
        if path in left.params and name in params:
            spared = any(path[: len(prefix)] == prefix for prefix in free)
            if value_of(leaf) is not params[name] and not spared:
                raise StageError(
                    f"unit {unit!r}: a call writes into the weight {name!r} ({kind}), which only "
                    "the optimiser may do: store the value in an nnx.BatchStat"
                )
        elif isinstance(leaf, nnx.Variable) and name not in state and not _is_passing(leaf):
            raise StageError(
                f"unit {unit!r}: a call creates the variable {name!r} ({kind}), which would be "
                "lost: create it in __init__, or sow it as nnx.Intermediate"
            )
    by_path = {text_of(path): value_of(leaf) for path, leaf in left.state.items()}
    return {name: _fitted(unit, name, before, by_path) for name, before in state.items()}


def _check_kind(where: str, leaf: Any, value: Any) -> None:
    """Rejects variables that cannot be trained."""
    if isinstance(leaf, nnx.RngState):
        return
    if isinstance(leaf, nnx.Cache):
        raise StageError(
            f"{where} is a cache of step-by-step decoding, in which nothing can be trained: build "
            "the module with decode=False and do not call init_cache"
        )
    if isinstance(leaf, nnx.OptState):
        raise StageError(f"{where} belongs to an optimiser: keep optimisers out of the network")
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise StageError(
            f"{where} contains a {type(value).__name__}, expected one array: split it up"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise StageError(f"{where} is a random key: keep it in nnx.Rngs, which draws anew per step")
    if isinstance(leaf, nnx.Param) and value.dtype not in FLOATS:
        raise StageError(
            f"{where} has dtype {value.dtype}, but weights need a gradient (known: "
            f"{_names(FLOATS)}): make it an nnx.Variable if it is not trained"
        )
    if value.dtype not in DTYPES:
        raise StageError(
            f"{where} has dtype {value.dtype}, which is not supported (known: {_names(DTYPES)})"
        )


def _is_passing(variable: nnx.Variable[Any]) -> bool:
    """Returns whether a variable that a call created may be dropped."""
    return isinstance(variable, (nnx.Intermediate, nnx.Perturbation, nnx.RngState))


def _fitted(unit: str, name: str, before: jax.Array, given: Mapping[str, Any]) -> jax.Array:
    """Returns a variable after a call, with its original dtype."""
    after = given.get(name)
    dtype = getattr(after, "dtype", None)
    same_kind = dtype == before.dtype or (dtype in FLOATS and before.dtype in FLOATS)
    if after is None or after.shape != before.shape or not same_kind:
        got = "nothing" if after is None else f"{dtype}{list(getattr(after, 'shape', ()))}"
        raise StageError(
            f"unit {unit!r}: a call changes the variable {name!r} to {got}, expected "
            f"{before.dtype}{list(before.shape)}: keep its shape and dtype"
        )
    return jnp.asarray(after, before.dtype)


def _names(dtypes: frozenset[Any]) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes))
