"""A model as an ordered tuple of named units."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from stages import context
from stages.draw import Draw
from stages.errors import StageError
from stages.foreign import describe

Arrays: TypeAlias = dict[str, jax.Array]
Variables: TypeAlias = dict[str, Arrays]
Factory: TypeAlias = Callable[[nnx.Rngs], Any]


class Unit(NamedTuple):
    """The smallest piece of a model that is never cut.

    Attributes:
      name: unique name; parameters are stored as "name/path".
      factory: builds the unit's NNX module (a callable of one array) from random streams.
      graph: the module's static part (`nnx.GraphDef`).
      params: abstract parameters by path.
      state: abstract batch statistics by path.
    """

    name: str
    factory: Factory
    graph: Any
    params: dict[str, jax.ShapeDtypeStruct]
    state: dict[str, jax.ShapeDtypeStruct]


class Model:
    """An ordered tuple of named units, each a Flax NNX module that maps one array to one array.

    Attributes:
      name: name of the model.
      input_shape: shape of one sample, (height, width, channels) for images.
      classes: number of classes.
      units: the units in order.
      input_dtype: dtype of a batch.
      recipe: what `stages.build` was called with, to build it again; None for a model of one's own.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[Unit],
        input_shape: Sequence[int],
        classes: int,
        input_dtype: Any = jnp.float32,
    ) -> None:
        """See `Model.from_units`, which builds the units."""
        self.name = name
        self.units = tuple(units)
        self.input_shape = tuple(int(size) for size in input_shape)
        self.classes = int(classes)
        self.input_dtype = jnp.dtype(input_dtype)
        self.programs: dict[Any, Any] = {}
        self.recipe: dict[str, Any] | None = None

    @classmethod
    def from_units(
        cls,
        name: str,
        units: Sequence[tuple[str, Factory]],
        input_shape: Sequence[int],
        classes: int,
        *,
        input_dtype: Any = jnp.float32,
    ) -> Model:
        """Makes a model of an ordered list of named NNX modules.

        Args:
          name: name of the model.
          units: pairs of a unit's name and a function from `nnx.Rngs` to its module. A module
            is called with one array [batch, …] and returns one array [batch, …].
          input_shape: shape of one sample.
          classes: number of classes.
          input_dtype: dtype of a batch (int32 for tokens).

        Raises:
          StageError: a unit's name, module or shape is illegal; the message names the unit.
        """
        built = tuple(_build_unit(unit, factory) for unit, factory in units)
        names = [unit.name for unit in built]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if not names or repeated:
            raise StageError(
                f"model {name!r} needs at least one unit and names without repetition, "
                f"got {names or 'no units'}; rename {repeated or 'nothing'}"
            )
        model = cls(name, built, input_shape, classes, input_dtype)
        model.shapes(2)
        return model

    @classmethod
    def from_module(
        cls,
        name: str,
        factory: Factory,
        units: Sequence[str],
        input_shape: Sequence[int],
        classes: int,
        *,
        input_dtype: Any = jnp.float32,
    ) -> Model:
        """Makes a model of one NNX module by naming the attributes that are its units.

        The model's forward pass is the units one after another; what the module's own
        `__call__` does beside that is not part of the model.

        Args:
          name: name of the model.
          factory: a function from `nnx.Rngs` to the module.
          units: paths of the attributes in order, "stem" or "blocks/0".
          input_shape: shape of one sample.
          classes: number of classes.
          input_dtype: dtype of a batch (int32 for tokens).

        Raises:
          StageError: an attribute does not exist, or as for `from_units`.
        """

        def pick(path: str) -> Factory:
            return lambda rngs: _attribute(name, factory(rngs), path)

        pairs = [(path.replace("/", "_"), pick(path)) for path in units]
        return cls.from_units(name, pairs, input_shape, classes, input_dtype=input_dtype)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the units in order."""
        return tuple(unit.name for unit in self.units)

    def init(self, seed: int, only: Collection[str] | None = None) -> tuple[Variables, Variables]:
        """Draws fresh variables; they depend on the seed and the units' names alone.

        Args:
          seed: root seed.
          only: names of the units to draw; None for all.

        Returns:
          params and state, each {unit: {path: array}}.
        """
        params: Variables = {}
        state: Variables = {}
        for unit in self.units:
            if only is not None and unit.name not in only:
                continue
            key = jax.random.fold_in(jax.random.key(seed % 2**32), name_hash(unit.name))
            _, drawn, other = _split(unit.factory(nnx.Rngs(key)))
            params[unit.name] = _flatten(drawn)
            state[unit.name] = _flatten(other)
        return params, state

    def shapes(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Infers the input of every unit and the output of the last, without computing.

        Args:
          batch: samples in the batch.

        Returns:
          len(units) + 1 abstract arrays; entry c is what crosses a cut at c.

        Raises:
          StageError: a unit does not accept what the one before it returns, or does not
            return one array.
        """
        x: Any = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (batch, *self.input_shape), self.input_dtype
        )
        found = [x]
        for unit in self.units:
            x = _abstract_call(self.name, unit, x)
            found.append(x)
        if len(x.shape) < 2 or x.shape[-1] != self.classes:
            raise StageError(
                f"model {self.name!r}, unit {self.units[-1].name!r}: the last unit must return "
                f"logits [batch, …, {self.classes}], got {x.shape}; check `classes`"
            )
        return tuple(found)


def name_hash(name: str) -> int:
    """A unit name's hash that is the same in every process (CRC-32)."""
    return zlib.crc32(name.encode())


def call_unit(
    unit: Unit, params: Arrays, state: Arrays, x: jax.Array, *, draw: Draw | None, train: bool
) -> tuple[jax.Array, Arrays]:
    """Calls one unit as a pure function.

    Args:
      unit: the unit.
      params: its parameters by path.
      state: its batch statistics by path.
      x: input [batch, …].
      draw: scalars of the micro-batch; None at inference.
      train: training or inference.

    Returns:
      output [batch, …] and the new batch statistics.
    """
    module = nnx.merge(unit.graph, _unflatten(params), _unflatten(state), copy=True)
    scope = context.Context(train=train, unit=unit.name, samples=int(x.shape[0]), draw=draw)
    with context.entered(scope):
        _prepare(module, scope)
        y = module(x)
        _, _, other = _split(module)
    return y, (_flatten(other) if train else state)


def parameter_count(model: Model) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for unit in model.units for leaf in unit.params.values())


def _build_unit(name: str, factory: Factory) -> Unit:
    """Finds a unit's static part and its variables' shapes without drawing any."""
    if not name or "/" in name:
        raise StageError(f"unit name {name!r} is empty or contains '/': choose another")
    try:
        module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    except StageError:
        raise
    except Exception as error:  # somebody's own code: whatever it raises is told with its line
        raise StageError(f"unit {name!r}: its factory failed: {describe(error)}") from error
    if not isinstance(module, nnx.Module) or not callable(module):
        raise StageError(
            f"unit {name!r}: the factory returned {type(module).__name__}, expected a callable "
            "NNX module; define __call__(self, x)"
        )
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Dropout):
            raise StageError(
                f"unit {name!r}, {'/'.join(map(str, path))}: nnx.Dropout draws one mask per call, "
                "so cuts and micro-batches would change it; use stages.layers.Dropout"
            )
    graph, params, other = _split(module)
    state = _flatten(other)
    for path_name, leaf in state.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise StageError(
                f"unit {name!r}: variable {path_name!r} has dtype {leaf.dtype}; variables other "
                "than parameters are averaged between devices and must be floating point "
                "(random streams: keep them out of the module, see stages.layers.Dropout)"
            )
    return Unit(name, factory, graph, _flatten(params), state)


def _abstract_call(model: str, unit: Unit, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Infers a unit's output; errors name the model, the unit and the shape that came in."""
    try:
        y, _ = jax.eval_shape(
            lambda params, state, x: call_unit(unit, params, state, x, draw=None, train=False),
            unit.params,
            unit.state,
            x,
        )
    except StageError:
        raise
    except Exception as error:  # somebody's own code: whatever it raises is told with its line
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: cannot take {x.dtype}{list(x.shape)} from the "
            f"unit before it: {describe(error)}"
        ) from error
    if not hasattr(y, "shape") or not y.shape or y.shape[0] != x.shape[0]:
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: returned {jax.tree.map(lambda a: a.shape, y)}, "
            f"expected one array [{x.shape[0]}, …]; a skip connection must not cross a cut, so "
            "put both of its ends into one unit"
        )
    checked: jax.ShapeDtypeStruct = y
    return checked


def _split(module: Any) -> tuple[Any, Any, Any]:
    """Splits a module into its static part, its parameters and its other variables."""
    graph, params, *others = nnx.split(module, nnx.Param, ...)
    return graph, params, others[0]


def _attribute(model: str, module: Any, path: str) -> Any:
    """Follows "blocks/0" through attributes and list entries."""
    for part in path.split("/"):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError, KeyError) as error:
            raise StageError(
                f"model {model!r}: the module has no unit {path!r} ({error}); name attributes "
                "of the module, list entries as 'blocks/0'"
            ) from error
    return module


def _prepare(module: Any, scope: context.Context) -> None:
    """Puts Flax's own batch normalisation into the mode of this call."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.BatchNorm):
            node.use_running_average = not scope.train
            if scope.train:
                node.momentum = nnx.data(node.momentum**scope.share)


def _flatten(tree: Any) -> dict[str, Any]:
    """Turns an NNX state into {path: array}."""
    return {
        "/".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(tree)
    }


def _unflatten(arrays: dict[str, Any]) -> dict[Any, Any]:
    """Turns {path: array} into the nested dictionary that `nnx.merge` takes."""
    tree: dict[Any, Any] = {}
    for path, value in arrays.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
