"""Units: Flax NNX modules that map one array to one array, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx

from stages import context
from stages.errors import StageError
from stages.foreign import describe
from stages.micro_batch_context import MicroBatchContext, make_draw
from stages.variables import Path, divide, draw_streams, nested, state_after

Arrays: TypeAlias = dict[str, jax.Array]
Variables: TypeAlias = dict[str, Arrays]
Factory: TypeAlias = Callable[[nnx.Rngs], Any]

#: Wrappers that overwrite a layer's weights in every call, by what they compute from them.
_NORMALISING = (nnx.WeightNorm, nnx.SpectralNorm)


class Unit(NamedTuple):
    """The smallest piece of a model that is never cut.

    Attributes:
      name: Unique name; parameters are stored as "name/path".
      factory: Builds the unit's NNX module (a callable of one array) from random streams.
      graph: The module's static part (``nnx.GraphDef``).
      params: Abstract parameters by path.
      state: Abstract batch statistics, and what else the module keeps, by path.
      streams: Abstract keys and counters of the module's random streams by path.
      paths: The path in the module of each path as text.
    """

    name: str
    factory: Factory
    graph: Any
    params: dict[str, jax.ShapeDtypeStruct]
    state: dict[str, jax.ShapeDtypeStruct]
    streams: dict[str, jax.ShapeDtypeStruct]
    paths: dict[str, Path]


def call_unit(
    unit: Unit,
    params: Arrays,
    state: Arrays,
    x: jax.Array,
    *,
    draw: MicroBatchContext | None,
    train: bool,
) -> tuple[jax.Array, Arrays]:
    """Calls one unit as a pure function.

    Args:
      unit: The unit.
      params: Its parameters by path.
      state: Its batch statistics by path.
      x: Input [batch, …].
      draw: Scalars of the micro-batch; None at inference.
      train: Training or inference.

    Returns:
      Output [batch, …] and the new batch statistics.

    Raises:
      StageError: The call changes variables that it may not (see ``state_after``).
    """
    scope = context.Context(train=train, unit=unit.name, samples=int(x.shape[0]), draw=draw)
    parts = (params, draw_streams(unit.streams, scope), state)
    module = nnx.merge(unit.graph, *(nested(part, unit.paths) for part in parts), copy=True)
    with context.entered(scope):
        _set_mode(module, scope)
        y = module(x)
        if not train:
            return y, state
        free = tuple(p for p, node in nnx.iter_graph(module) if isinstance(node, _NORMALISING))
        return y, state_after(unit.name, divide(module), params, state, free)


def infer(model: str, unit: Unit, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Infers a unit's output at inference, without computing.

    Args:
      model: Name of the model, for messages.
      unit: The unit.
      x: Its input, abstract.

    Raises:
      StageError: The unit does not accept the input, or does not return one array.
    """
    y = _trace(model, unit, x, train=False)
    if not hasattr(y, "shape") or not y.shape or y.shape[0] != x.shape[0]:
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: returned {jax.tree.map(lambda a: a.shape, y)}, "
            f"expected one array [{x.shape[0]}, …]; a skip connection must not cross a cut, so "
            "put both of its ends into one unit"
        )
    checked: jax.ShapeDtypeStruct = y
    return checked


def check_training(
    model: str, unit: Unit, x: jax.ShapeDtypeStruct, y: jax.ShapeDtypeStruct
) -> None:
    """Traces a unit in training mode, so that what cannot be trained is refused at once.

    Args:
      model: Name of the model, for messages.
      unit: The unit.
      x: Its input, abstract.
      y: Its output at inference, abstract.

    Raises:
      StageError: The call fails, returns something else, or changes variables that it may not.
    """
    trained = _trace(model, unit, x, train=True)
    if getattr(trained, "shape", None) != y.shape or trained.dtype != y.dtype:
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: returns {trained} in training, but {y} at "
            "inference: let it return the same shape and dtype"
        )


def _trace(model: str, unit: Unit, x: jax.ShapeDtypeStruct, *, train: bool) -> Any:
    """Traces a call; errors name the model, the unit and the shape that came in."""
    draw = make_draw(x.shape[0]) if train else None
    try:
        return jax.eval_shape(
            lambda params, state, x: call_unit(unit, params, state, x, draw=draw, train=train)[0],
            unit.params,
            unit.state,
            x,
        )
    except StageError as error:
        raise StageError(f"model {model!r}, {error}") from error
    except Exception as error:  # somebody's own code: whatever it raises is told with its line
        doing = "be trained on" if train else "take"
        hint = ""
        if "ToNNX" in str(unit.graph):
            hint = (
                " (a module of flax.linen is not told what is training: keep dropout and batch "
                "statistics out of it, and call lazy_init in the factory)"
            )
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: cannot {doing} {x.dtype}{list(x.shape)} from "
            f"the unit before it: {describe(error)}{hint}"
        ) from error


def _set_mode(module: Any, scope: context.Context) -> None:
    """Puts Flax's own layers into the mode of this call."""
    if scope.train:
        module.train()
    else:
        module.eval()
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.BatchNorm) and scope.train:
            node.momentum = nnx.data(node.momentum**scope.share)
        if isinstance(node, nnx.bridge.ToNNX) and not scope.train:
            node.to_nnx__rngs = None  # so that drawing at inference fails, by name
