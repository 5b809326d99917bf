"""Networks that a user brings, as pure functions of variables by path."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from stages import context
from stages.building import abstractly, build_module, build_units
from stages.errors import StageError
from stages.foreign import describe
from stages.layers.flax_norm import linen_batch_norm
from stages.micro_batch_context import MicroBatchContext, name_hash
from stages.trees import Arrays, Path, PyTree
from stages.unit import ModuleUnit
from stages.variables import FLOATS, divide, draw_streams, text_of, value_of

Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]

#: Parameters that set a network's mode, and whether they mean training.
_MODES = {
    "train": True, "training": True, "is_training": True,
    "deterministic": False, "inference": False, "use_running_average": False,
}  # fmt: skip
#: Parameters of a plain function that receive a random key.
_KEYS = ("key", "rng")


class Network(abc.ABC):
    """A whole network as a pure function.

    Attributes:
      name: The model's name.
      params: Abstract weights by path.
      state: Abstract statistics and other kept values, by path.
    """

    name: str
    params: Shapes
    state: Shapes

    @abc.abstractmethod
    def draw(self, seed: int) -> tuple[Arrays, Arrays]:
        """Returns fresh weights and state by path."""

    def matching(self, chosen: Any) -> frozenset[str]:
        """Returns the paths of the weights that match a filter of Flax; see ``Unit.matching``."""
        raise StageError(
            f"model {self.name!r}: the filter {chosen!r} is for NNX modules; give a pattern of the "
            "weights' names, such as 'lora|head'"
        )

    @abc.abstractmethod
    def call(
        self,
        params: Arrays,
        state: Arrays,
        inputs: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[PyTree, Arrays]:
        """Returns the output and the new state.

        Args:
          params: Weights by path.
          state: State by path.
          inputs: Batches by the parameter that receives them; a batch without a name, "",
            is the first.
          draw: Scalars of the micro-batch; None at inference.
          train: Training or inference.
        """


class NnxNetwork(Network):
    """An NNX module: a factory is called for each seed, an instance keeps its weights."""

    def __init__(self, name: str, given: PyTree) -> None:
        """Wraps a module, or a function from ``nnx.Rngs`` to a module.

        Raises:
          StageError: The factory fails, or the module holds values that cannot be trained with.
        """
        self.name = name
        self._held = divide(given) if isinstance(given, nnx.Module) else None
        factory = (lambda _: given) if self._held else given

        def build() -> ModuleUnit:
            module = nnx.clone(given) if self._held else build_module(name, factory)
            return build_units(name, [(name, factory)], [module])[0]

        self._unit = build() if self._held else abstractly(build)
        self.params, self.state = self._unit.params, self._unit.state
        self.matching = self._unit.matching  # type: ignore[method-assign]
        self._modes = {} if self._held is None else _modes(given.__call__)
        if self._held is None:
            abstractly(lambda: self._modes.update(_modes(factory(nnx.Rngs(0)).__call__)))

    def draw(self, seed: int) -> tuple[Arrays, Arrays]:
        """Returns fresh values of the factory, or the module's own values."""
        if self._held is None:
            return self._unit.draw(seed, {})
        return _values(self._held.params, self.params), _values(self._held.state, self.state)

    def call(
        self,
        params: Arrays,
        state: Arrays,
        inputs: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[PyTree, Arrays]:
        """Calls the module in training or evaluation mode."""
        given, named = _arguments(inputs, self._modes, train)
        return self._unit.run(
            params, state, given, named,
            samples=_samples(inputs), draw=draw, train=train,
        )  # fmt: skip


class LinenNetwork(Network):
    """A Linen module: ``params`` are weights, all other collections but sown values are state."""

    def __init__(self, name: str, module: linen.Module, inputs: Shapes) -> None:
        """Initialises the module abstractly.

        Raises:
          StageError: The module cannot be initialised.
        """
        self.name, self._module, self._inputs = name, module, inputs
        self._modes = _modes(type(module).__call__)
        try:
            drawn = jax.eval_shape(self._init, jax.random.key(0))
        except Exception as error:  # user code: whatever it raises is reported with its line
            raise StageError(
                f"model {name!r}: {type(module).__name__} of flax.linen cannot be initialised with "
                f"{_shown(inputs)}: {describe(error)}"
            ) from error
        # Names of Linen's variables may have a slash (those of WeightNorm and SpectralNorm do).
        self._keys: dict[str, tuple[str, ...]] = {}
        for variables in drawn.values():
            for key in traverse_util.flatten_dict(variables):  # type: ignore[no-untyped-call]
                if self._keys.setdefault("/".join(key), key) != key:
                    raise StageError(_ambiguous(name, "/".join(key)))
        self.params = _flat(drawn.pop("params", {}))
        self._homes: dict[str, tuple[str, str]] = {}
        self.state, self._sown = {}, {"intermediates"}
        for collection, variables in sorted(drawn.items()):
            for path, value in _flat(variables).items():
                if isinstance(value, tuple):  # one more with each call, and dropped after it
                    self._sown.add(collection)
                    continue
                known = path in self.params or path in self.state
                here = f"{path}/{collection}" if known else path
                self._homes[here], self.state[here] = (collection, path), value

    def draw(self, seed: int) -> tuple[Arrays, Arrays]:
        """Initialises the module."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), name_hash(self.name))
        drawn = jax.jit(self._init)(key)
        parts = {collection: _flat(variables) for collection, variables in drawn.items()}
        state = {here: parts[home][path] for here, (home, path) in self._homes.items()}
        return parts.get("params", {}), state

    def call(
        self,
        params: Arrays,
        state: Arrays,
        inputs: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[PyTree, Arrays]:
        """Applies the module; state may change in training."""
        variables: dict[str, dict[str, PyTree]] = {"params": dict(params)}
        for here, (collection, path) in self._homes.items():
            variables.setdefault(collection, {})[path] = state[here]
        nested = {
            collection: traverse_util.unflatten_dict(  # type: ignore[no-untyped-call]
                {self._keys[path]: array for path, array in arrays.items()}
            )
            for collection, arrays in variables.items()
        }
        scope = context.Context(train=train, unit=self.name, samples=_samples(inputs), draw=draw)
        streams = jax.eval_shape(lambda: {n: jax.random.key(0) for n in ("params", "dropout")})
        changing = sorted({collection for collection, _ in self._homes.values()})
        with context.entered(scope), linen.intercept_methods(_slowed(scope)):
            given, named = _arguments(inputs, self._modes, train)
            y, after = self._module.apply(
                nested,
                *given,
                **named,
                rngs=draw_streams(streams, scope) if train else {},
                mutable=sorted({*changing, *self._sown} if train else self._sown),
            )
        if not train:
            return y, state
        left = {collection: _flat(after.get(collection, {})) for collection in changing}
        return y, {
            here: left[home].get(path, state[here]) for here, (home, path) in self._homes.items()
        }

    def _init(self, key: jax.Array) -> PyTree:
        """Returns all freshly drawn collections for a batch, without sown values."""
        batch = {n: jnp.ones(shape.shape, shape.dtype) for n, shape in self._inputs.items()}
        given, named = _arguments(batch, self._modes, train=False)
        drawn = self._module.init({"params": key, "dropout": key}, *given, **named)
        unboxed = dict(linen.meta.unbox(drawn))
        return {n: dict(values) for n, values in unboxed.items() if n != "intermediates"}


class FunctionNetwork(Network):
    """A plain function of a pytree of parameters and a batch; floating leaves are weights."""

    def __init__(self, name: str, function: Callable[..., Any], params: PyTree) -> None:
        """Wraps the function and its parameters, or a function from a key to parameters.

        Raises:
          StageError: The parameters are not a pytree of arrays.
        """
        self.name, self._function, self._given = name, function, params
        try:
            drawn = jax.eval_shape(self._draw, jax.random.key(0))
        except Exception as error:  # user code: whatever it raises is reported with its line
            raise StageError(
                f"model {name!r}: params is neither a pytree of arrays nor a function from a key "
                f"to such a pytree: {describe(error)}"
            ) from error
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(drawn)
        self._paths = [
            jax.tree_util.keystr(path, simple=True, separator="/") or "params" for path, _ in leaves
        ]
        for place, path in enumerate(self._paths):
            if path in self._paths[:place]:
                raise StageError(_ambiguous(name, path))
        shapes = dict(zip(self._paths, (leaf for _, leaf in leaves), strict=True))
        self.params = {path: shape for path, shape in shapes.items() if shape.dtype in FLOATS}
        self.state = {path: shape for path, shape in shapes.items() if path not in self.params}
        self._modes = _modes(function)
        self._keys = [n for n in _KEYS if n in _parameters(function)]

    def draw(self, seed: int) -> tuple[Arrays, Arrays]:
        """Returns freshly drawn parameters, or those that were given."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), name_hash(self.name))
        drawn = dict(zip(self._paths, jax.tree.leaves(self._draw(key)), strict=True))
        return {n: drawn[n] for n in self.params}, {n: drawn[n] for n in self.state}

    def call(
        self,
        params: Arrays,
        state: Arrays,
        inputs: Mapping[str, jax.Array],
        *,
        draw: MicroBatchContext | None,
        train: bool,
    ) -> tuple[PyTree, Arrays]:
        """Calls the function; parameters that are not floats stay unchanged."""
        held = {**params, **state}
        tree = jax.tree.unflatten(self._tree, [held[path] for path in self._paths])
        scope = context.Context(train=train, unit=self.name, samples=_samples(inputs), draw=draw)
        streams = jax.eval_shape(lambda: {n: jax.random.key(0) for n in self._keys})
        with context.entered(scope):
            given, named = _arguments(inputs, self._modes, train)
            y = self._function(tree, *given, **named, **draw_streams(streams, scope))
        return y, state

    def _draw(self, key: jax.Array) -> PyTree:
        made = self._given(key) if callable(self._given) else self._given
        return jax.tree.map(jnp.asarray, made)


def _values(leaves: Mapping[Path, PyTree], wanted: Shapes) -> Arrays:
    """Returns a module's variables by path as text; copies, since a caller may donate them."""
    by_path = {text_of(path): value_of(leaf) for path, leaf in leaves.items()}
    return {path: jnp.array(by_path[path]) for path in wanted}


def _ambiguous(name: str, path: str) -> str:
    """Returns a message about two variables with one path."""
    return (
        f"model {name!r}: two variables have the path {path!r}, since keys contain slashes: rename "
        "one of them"
    )


def _flat(tree: PyTree) -> dict[str, PyTree]:
    """Returns a nested dictionary by path as text."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))  # type: ignore[no-untyped-call]


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _modes(function: Any) -> dict[str, bool]:
    """Returns the mode parameters of a function, and their values in training."""
    return {name: _MODES[name] for name in _parameters(function) if name in _MODES}


def _arguments(
    inputs: Mapping[str, PyTree], modes: Mapping[str, bool], train: bool
) -> tuple[list[Any], dict[str, Any]]:
    """Returns a network's arguments, by position and by name."""
    named = {name: value for name, value in inputs.items() if name}
    said = {name: value is train for name, value in modes.items()}
    return [inputs[name] for name in inputs if not name], {**named, **said}


def _samples(inputs: Mapping[str, PyTree]) -> int:
    return int(next(iter(inputs.values())).shape[0])


def _shown(inputs: Shapes) -> str:
    return ", ".join(f"{n} {array.dtype}{list(array.shape)}".strip() for n, array in inputs.items())


def _slowed(scope: context.Context) -> Callable[..., Any]:
    """Returns an interceptor of batch normalisation, in training.

    Running averages decay by a micro-batch's share, and the formulation is ours where it fits.
    """

    def intercept(call: Any, args: Any, kwargs: Any, at: Any) -> PyTree:
        module = at.module
        if (
            not scope.train
            or at.method_name != "__call__"
            or not isinstance(module, linen.BatchNorm)
        ):
            return call(*args, **kwargs)
        momentum = module.momentum**scope.share
        normalised = linen_batch_norm(module, momentum, *args, **kwargs)
        if normalised is not None:
            return normalised
        with _replaced(module, "momentum", momentum):
            return call(*args, **kwargs)

    return intercept


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Sets a field of a frozen module for the length of a call."""
    before = getattr(module, name)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__setattr__(module, name, before)
