"""Units: pieces of a model that map one array to one array, as pure functions."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from stages import context
from stages.equations import origin
from stages.errors import StageError
from stages.foreign import describe
from stages.layers.flax_norm import write_out
from stages.micro_batch_context import MicroBatchContext, make_draw, name_hash
from stages.trees import Arrays, Path, PyTree
from stages.variables import divide, draw_streams, nested, state_after, text_of, value_of

Factory: TypeAlias = Callable[[nnx.Rngs], Any]

#: Wrappers that overwrite a layer's weights in every call by values computed from them.
_NORMALISING = (nnx.WeightNorm, nnx.SpectralNorm)


@dataclasses.dataclass(frozen=True, eq=False)
class Unit(abc.ABC):
    """The smallest piece of a model that is never cut: a pure function with variables.

    Attributes:
      name: Unique name; parameters are stored as "name/path".
      graph: The static part, hashable; units with equal graphs, and equal shapes of variables and
        inputs, have equal computations.
      params: Abstract parameters by path.
      state: Abstract batch statistics and other variables of the unit, by path.
      sides: Names of its side inputs (masks, lengths).
      frozen: Abstract weights that are not trained, by path; they are not among ``params``.
      personal: Paths of the weights in ``params`` that each device keeps for itself.
      is_ours: Whether it consists of ``stages.layers`` only, which choose their formulations
        themselves and need no check.
    """

    name: str
    graph: Any
    params: dict[str, jax.ShapeDtypeStruct]
    state: dict[str, jax.ShapeDtypeStruct]
    sides: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    frozen: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict, kw_only=True)
    personal: frozenset[str] = dataclasses.field(default=frozenset(), kw_only=True)
    is_ours: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def shared(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract weights that are trained and averaged."""
        return {path: one for path, one in self.params.items() if path not in self.personal}

    @property
    def personal_bytes(self) -> int:
        """Bytes of the weights that a device keeps for itself."""
        of = [self.params[path] for path in self.personal]
        return sum(one.size * one.dtype.itemsize for one in of)

    @property
    def weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All abstract weights, trained and frozen."""
        return {**self.params, **self.frozen}

    def training(self, paths: Collection[str]) -> Self:
        """Returns the unit with no other weights trained than those of some paths."""
        made = copy.copy(self)
        weights = self.weights
        object.__setattr__(
            made, "params", {n: weight for n, weight in weights.items() if n in paths}
        )
        object.__setattr__(
            made, "frozen", {n: weight for n, weight in weights.items() if n not in paths}
        )
        return made

    def personalising(self, paths: Collection[str]) -> Self:
        """Returns the unit with the weights of some paths, among those it trains, personal."""
        made = copy.copy(self)
        object.__setattr__(made, "personal", frozenset(paths))
        return made

    @property
    @abc.abstractmethod
    def draws(self) -> bool:
        """Whether calls in training may draw for a micro-batch what a sample alone would not get.

        Samples that are called one by one then have other dropout masks than together.
        """

    @abc.abstractmethod
    def expect_lengths(self, lengths: Sequence[int]) -> None:
        """Prepares for inputs of several lengths (``stages.lengths``), where that needs anything.

        Args:
          lengths: The lengths of the model's input, the longest last.

        Raises:
          StageError: The network is another one with one of them.
        """

    @abc.abstractmethod
    def matching(self, chosen: Any) -> frozenset[str]:
        """Returns the paths of the weights that a filter of Flax picks.

        Args:
          chosen: The filter, such as ``nnx.LoRAParam``.

        Raises:
          StageError: The unit's variables are not those of NNX.
        """

    @abc.abstractmethod
    def draw(self, seed: int, drawn: dict[Any, Any]) -> tuple[Arrays, Arrays]:
        """Draws new variables.

        Args:
          seed: Root seed.
          drawn: Variables drawn so far by units of the same model.

        Returns:
          All weights and the state by path.

        Raises:
          StageError: The variables are not those that the unit has.
        """

    @abc.abstractmethod
    def call(
        self,
        params: Arrays,
        state: Arrays,
        x: jax.Array,
        side: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[jax.Array, Arrays]:
        """Calls the unit as a pure function.

        Args:
          params: Its weights by path, trained and frozen.
          state: Its batch statistics by path.
          x: Input [batch, …].
          side: Side inputs by name, those of ``sides`` at least.
          draw: Scalars of the micro-batch; None at inference.
          train: Training or inference.

        Returns:
          Output [batch, …] and the new batch statistics.

        Raises:
          StageError: The call changes variables that it must not change (see ``state_after``).
        """

    @abc.abstractmethod
    def infer(
        self, model: str, x: jax.ShapeDtypeStruct, side: Mapping[str, jax.ShapeDtypeStruct]
    ) -> jax.ShapeDtypeStruct:
        """Infers the output at inference, without computing.

        Args:
          model: Name of the model, for messages.
          x: The input, abstract.
          side: Side inputs by name, abstract.

        Raises:
          StageError: The unit does not accept the input, or does not return one array.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleUnit(Unit):
    """A unit that is an NNX module.

    Attributes:
      factory: Builds the module (a callable of one array, and of side inputs by name) from random
        streams.
      streams: Abstract keys and counters of the module's random streams by path.
      paths: The path in the module of each path as text.
    """

    factory: Factory
    streams: dict[str, jax.ShapeDtypeStruct]
    paths: dict[str, Path]

    @property
    def draws(self) -> bool:
        """Whether the module has random streams; see ``Unit.draws``."""
        return bool(self.streams)

    def expect_lengths(self, lengths: Sequence[int]) -> None:
        """Needs nothing: the module is called with whatever comes; see ``Unit.expect_lengths``."""

    def draw(self, seed: int, drawn: dict[Any, Any]) -> tuple[Arrays, Arrays]:
        """Calls the factory; variables depend only on the seed and the unit's name."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), name_hash(self.name))
        parts = divide(self.factory(nnx.Rngs(key)))
        return self._arrays(self.weights, parts.params), self._arrays(self.state, parts.state)

    def matching(self, chosen: Any) -> frozenset[str]:
        """Asks Flax; see ``Unit.matching``."""
        matching: list[Any] = []

        def ask() -> None:
            module = self.factory(nnx.Rngs(0))
            matching.extend(path for path, _ in nnx.to_flat_state(nnx.state(module, chosen)))

        jax.eval_shape(ask)
        return frozenset(map(text_of, matching)) & self.weights.keys()

    def _arrays(self, wanted: Mapping[str, Any], leaves: Mapping[Path, Any]) -> Arrays:
        """Returns drawn variables by path as text; what was sown meanwhile is left out."""
        by_path = {text_of(path): value_of(leaf) for path, leaf in leaves.items()}
        missing = sorted(wanted.keys() - by_path.keys())
        if missing:
            raise StageError(
                f"unit {self.name!r}: its factory did not create the variable {missing[0]!r} this "
                "time: it has to create the same module in every call"
            )
        return {path: jnp.asarray(by_path[path], shape.dtype) for path, shape in wanted.items()}

    def call(
        self,
        params: Arrays,
        state: Arrays,
        x: jax.Array,
        side: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[jax.Array, Arrays]:
        """Calls the module with one array; see ``Unit.call``."""
        named = {name: side[name] for name in self.sides}
        return self.run(params, state, (x,), named, samples=int(x.shape[0]), draw=draw, train=train)

    def run(
        self,
        params: Arrays,
        state: Arrays,
        args: Sequence[jax.Array],
        named: Mapping[str, Any],
        *,
        samples: int,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[PyTree, Arrays]:
        """Merges the module and calls it with any arguments.

        Args:
          params: Its parameters by path.
          state: Its batch statistics by path.
          args: Arguments by position.
          named: Arguments by name.
          samples: Samples of the batch.
          draw: Scalars of the micro-batch; None at inference.
          train: Training or inference.

        Returns:
          The result of the module, and the new batch statistics.

        Raises:
          StageError: As for ``call``.
        """
        scope = context.Context(train=train, unit=self.name, samples=samples, draw=draw)
        parts = (params, draw_streams(self.streams, scope), state)
        module = nnx.merge(self.graph, *(nested(part, self.paths) for part in parts), copy=True)
        with context.entered(scope):
            _set_mode(module, scope)
            y = module(*args, **named)
            if not train:
                return y, state
            free = tuple(p for p, node in nnx.iter_graph(module) if isinstance(node, _NORMALISING))
            left = divide(module)
            passed = _passed_on(
                left, params, lambda own: self._left(own, parts, args, named, scope)
            )
            return y, state_after(self.name, left, passed, state, free)

    def _left(
        self, params: Arrays, parts: Any, args: Sequence[Any], named: Mapping[str, Any], scope: Any
    ) -> Arrays:
        """Returns the weights that a call in training leaves."""
        given = (params, *parts[1:])
        module = nnx.merge(self.graph, *(nested(one, self.paths) for one in given), copy=True)
        with context.entered(dataclasses.replace(scope, calls=0)):
            _set_mode(module, scope)
            module(*args, **named)
        left = divide(module).params
        return {n: value_of(leaf) for p, leaf in left.items() if (n := text_of(p)) in params}

    def infer(
        self, model: str, x: jax.ShapeDtypeStruct, side: Mapping[str, jax.ShapeDtypeStruct]
    ) -> jax.ShapeDtypeStruct:
        """Traces a call; see ``Unit.infer``."""
        y = _trace(model, self, x, side, train=False)
        if not hasattr(y, "shape") or not y.shape or y.shape[0] != x.shape[0]:
            raise StageError(
                f"model {model!r}, unit {self.name!r}: returned "
                f"{jax.tree.map(lambda a: a.shape, y)}, expected one array [{x.shape[0]}, …]; a "
                "skip connection must not cross a cut, so put both of its ends into one unit"
            )
        checked: jax.ShapeDtypeStruct = y
        return checked


def _passed_on(left: Any, params: Arrays, again: Callable[[Arrays], Arrays]) -> Arrays:
    """Returns the weights, those that a call only passed on as it has them.

    ``nnx.jit`` and ``nnx.remat`` write all variables of a module back, changed or not, so another
    object in a weight's place does not say that it was written: the equations do.
    """
    after = {text_of(path): value_of(leaf) for path, leaf in left.params.items()}
    other = [n for n in params if n in after and after[n] is not params[n]]
    if not other:
        return params
    closed, shapes = jax.make_jaxpr(again, return_shape=True)(dict(params))
    ends = dict(zip(sorted(shapes), closed.jaxpr.outvars, strict=True))
    starts = dict(zip(sorted(params), closed.jaxpr.invars, strict=True))
    same = {n for n in other if origin(closed.jaxpr, ends[n]) is starts[n]}
    return {n: after[n] if n in same else value for n, value in params.items()}


def check_training(
    model: str, unit: ModuleUnit, x: jax.ShapeDtypeStruct, y: jax.ShapeDtypeStruct
) -> None:
    """Traces a unit in training mode, so that untrainable units are rejected immediately.

    Args:
      model: Name of the model, for messages.
      unit: The unit.
      x: Its input, abstract.
      y: Its output at inference, abstract.

    Raises:
      StageError: The call fails, returns something else, or changes variables that it must not
        change.
    """
    trained = _trace(model, unit, x, {}, train=True)
    if getattr(trained, "shape", None) != y.shape or trained.dtype != y.dtype:
        raise StageError(
            f"model {model!r}, unit {unit.name!r}: returns {trained} in training, but {y} at "
            "inference: it has to return the same shape and dtype"
        )


def _trace(
    model: str,
    unit: ModuleUnit,
    x: jax.ShapeDtypeStruct,
    side: Mapping[str, jax.ShapeDtypeStruct],
    *,
    train: bool,
) -> Any:
    """Traces a call; errors name the model, the unit and the shape of the input."""
    draw = make_draw(x.shape[0]) if train else None
    try:
        return jax.eval_shape(
            lambda *arrays: unit.call(*arrays, draw=draw, train=train)[0],
            unit.weights,
            unit.state,
            x,
            dict(side),
        )
    except StageError as error:
        raise StageError(f"model {model!r}, {error}") from error
    except Exception as error:  # the user's code: any exception is reported with its line
        doing = "be trained on" if train else "take"
        hint = ""
        if "ToNNX" in str(unit.graph):
            hint = (
                " (a module of flax.linen does not know whether it is trained: use no dropout "
                "and batch statistics in it, and call lazy_init in the factory)"
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
            # An array of the module, so that Flax's transforms pass it on; where the layer is
            # mapped or scanned, one number for each of its copies.
            copies = node.mean.get_value().shape[:-1] if node.mean is not None else ()
            slower = jnp.broadcast_to(node.momentum**scope.share, copies)
            node.momentum = nnx.data(slower)  # type: ignore[assignment]
            write_out(node)
        if isinstance(node, nnx.bridge.ToNNX) and not scope.train:
            node.to_nnx__rngs = None  # so that drawing at inference fails, by name
