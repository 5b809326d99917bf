"""A model as an ordered tuple of named units."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stages.building import abstractly, build_module, build_units, check_module, module_at
from stages.errors import StageError
from stages.frozen import Base, Frozen
from stages.patterns import matching
from stages.signature import ArrayType, Signature, unwrapped
from stages.tasks.per_sample import check_alone, check_task
from stages.tasks.registered import classification
from stages.tasks.task import Task
from stages.trees import PyTree, Variables
from stages.unit import Factory, ModuleUnit, Unit, check_training

#: What a model is trained for unless it is said.
_CLASSIFICATION = classification()


class Model:
    """An ordered tuple of named units, each a Flax NNX module that maps one array to one array.

    Attributes:
      name: Name of the model.
      input_shape: Shape of one sample, (height, width, channels) for images.
      classes: Size of the last axis of the outputs, such as the number of classes; 0 if any will
        do.
      units: The units in order.
      input_dtype: Dtype of a batch.
      sides: For each side input (mask, lengths) shape and dtype of one sample.
      targets: For each target shape and dtype of one sample; None until the data are known.
      lengths: What samples are padded to (``stages.lengths``); none: all are equally long.
      obstacles: Why positions are not cuts, where the cuts were found by tracing.
      frozen: Weights that are not trained.
      task: What it is trained for.
      has_task: Whether the task was given with ``for_task``, and not taken for granted.
      recipe: Arguments of ``stages.build``, to build the model again; None for the user's own
        model.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[Unit],
        input_shape: Sequence[int],
        classes: int,
        input_dtype: DTypeLike = jnp.float32,
    ) -> None:
        """See ``Model.from_units``, which builds the units."""
        self.name = name
        self.units = tuple(units)
        self.input_shape = tuple(int(size) for size in input_shape)
        self.classes = int(classes)
        self.input_dtype = jnp.dtype(input_dtype)
        self.sides: dict[str, jax.ShapeDtypeStruct] = {}
        self.targets: dict[str, jax.ShapeDtypeStruct] | None = None
        self.lengths: tuple[int, ...] = ()
        self.obstacles: tuple[Obstacle, ...] = ()
        self.frozen = Frozen(self.units, 0)
        self.task, self.has_task = _CLASSIFICATION, False
        self.programs: dict[Any, Any] = {}
        self._programs_by_task: list[tuple[Task, dict[Any, Any]]] = []
        self._shapes: dict[Any, tuple[jax.ShapeDtypeStruct, ...]] = {}
        self.recipe: dict[str, Any] | None = None

    @classmethod
    def from_units(
        cls,
        name: str,
        units: Sequence[tuple[str, Factory]],
        input_shape: Sequence[int],
        classes: int,
        *,
        input_dtype: DTypeLike = jnp.float32,
    ) -> Model:
        """Creates a model from an ordered list of named NNX modules.

        Args:
          name: Name of the model.
          units: Pairs of a unit's name and a function from ``nnx.Rngs`` to its module. A module
            is called with one array [batch, …] and returns one array [batch, …].
          input_shape: Shape of one sample.
          classes: Number of classes.
          input_dtype: Dtype of a batch (int32 for tokens).

        Raises:
          StageError: The name, module or shape of a unit is not valid; the message names the unit.
        """
        # Built together: what two units share is one object in both.
        built = abstractly(
            lambda: build_units(name, units, [build_module(*unit) for unit in units])
        )
        return cls._of_built(name, built, input_shape, classes, input_dtype)

    @classmethod
    def from_module(
        cls,
        name: str,
        factory: Factory,
        units: Sequence[str],
        input_shape: Sequence[int],
        classes: int,
        *,
        input_dtype: DTypeLike = jnp.float32,
    ) -> Model:
        """Creates a model from one NNX module whose attributes are the units.

        The forward pass of the model is that of the units in order; the module's own ``__call__``
        is not used.

        Args:
          name: Name of the model.
          factory: A function from ``nnx.Rngs`` to the module.
          units: Paths of the attributes in order, "stem" or "blocks/0".
          input_shape: Shape of one sample.
          classes: Number of classes.
          input_dtype: Dtype of a batch (int32 for tokens).

        Raises:
          StageError: An attribute does not exist, or as for ``from_units``.
        """

        def pick(path: str) -> Factory:
            return lambda rngs: module_at(name, factory(rngs), path)

        pairs = [(path.replace("/", "_"), pick(path)) for path in units]

        def build() -> list[ModuleUnit]:
            whole = build_module(name, factory, is_unit=False)
            modules = [check_module(path, module_at(name, whole, path)) for path in units]
            return build_units(name, pairs, modules)

        built = abstractly(build)
        return cls._of_built(name, built, input_shape, classes, input_dtype)

    @classmethod
    def _of_built(
        cls,
        name: str,
        built: Sequence[ModuleUnit],
        input_shape: Sequence[int],
        classes: int,
        input_dtype: DTypeLike,
    ) -> Model:
        """Creates a model from units, and checks that they match and can be trained."""
        model = cls(name, built, input_shape, classes, input_dtype)
        shapes = model.shapes(2)
        for i, unit in enumerate(built):
            if not unit.is_ours:
                check_training(name, unit, shapes[i], shapes[i + 1])
        return model

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the units in order."""
        return tuple(unit.name for unit in self.units)

    def init(self, seed: int, only: Collection[str] | None = None) -> tuple[Variables, Variables]:
        """Draws new variables, which depend only on the seed and the units' names.

        Args:
          seed: Root seed.
          only: Names of the units to draw; None for all.

        Returns:
          The weights that are trained, and the state, each {unit: {path: array}}.
        """
        params: Variables = {}
        state: Variables = {}
        drawn: dict[Any, Any] = {}
        for unit in self.units:
            if only is None or unit.name in only:
                weights, state[unit.name] = unit.draw(seed, drawn)
                weights |= self.frozen.given(unit)
                params[unit.name] = {path: weights[path] for path in unit.params}
        return params, state

    def training(self, chosen: Any, seed: int = 0) -> Model:
        """Returns the model with some of its weights trained and all others frozen.

        Frozen weights have no gradient and no optimiser state, are not averaged, and are drawn by
        each host itself. Statistics of frozen layers change as ever.

        Args:
          chosen: A regular expression that is searched for in the names ``unit/path``, such as
            "lora|head"; or a filter of Flax, such as ``nnx.LoRAParam``.
          seed: Root seed, from which frozen weights are drawn.

        Raises:
          StageError: No weight matches, or the expression is not valid.
        """
        if isinstance(chosen, str):
            weights = {unit.name: unit.weights for unit in self.units}
            paths: Mapping[str, Collection[str]] = matching(weights, chosen)
        else:
            paths = {unit.name: sorted(unit.matching(chosen)) for unit in self.units}
        if not any(paths.values()):
            names = [f"{unit.name}/{path}" for unit in self.units for path in unit.weights]
            raise StageError(
                f"model {self.name!r}: no weight matches {chosen!r}, so nothing would be trained; "
                f"its weights are {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            )
        return self.with_units([unit.training(paths[unit.name]) for unit in self.units], seed)

    def completed(self, params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns the weights of units with their frozen ones, as the unfrozen model has them."""
        frozen = self.frozen.of(tuple(params))
        return {unit: {**arrays, **frozen.get(unit, {})} for unit, arrays in params.items()}

    @property
    def unfrozen(self) -> Model:
        """The model with all weights trained."""
        if not any(unit.frozen for unit in self.units):
            return self
        return self.with_units([unit.training(unit.weights) for unit in self.units], 0)

    def for_task(self, task: Task) -> Model:
        """Returns the model, to be trained for a task.

        Models for equal registered tasks share what they compile, such as those of the hosts of one
        process.

        Raises:
          StageError: Task and outputs do not fit together.
        """
        made = copy.copy(self)
        made.task, made.has_task, made.programs = task, True, self._programs_for(task)
        if self.targets is not None or task.targets.like((1,)) is not None:
            made.check_task()
        return made

    def _programs_for(self, task: Task) -> dict[Any, Any]:
        """Returns the programs of an earlier model for an equal task, or none yet."""
        if not task.is_registered:  # each call of a user's function makes another task
            return {}
        self._programs_by_task.append((task, {}))
        # The first one, even if another thread asks at the same time.
        return next(programs for known, programs in self._programs_by_task if known == task)

    def check_alone(self, targets: PyTree) -> None:
        """Checks that a task of the user's own looks at each sample alone.

        Args:
          targets: Targets [2, …] of two samples, as the loss gets them.

        Raises:
          StageError: It does not.
        """
        if not self.task.is_registered:
            check_alone(self.task, self.shapes(2)[-1], targets)

    def check_task(self) -> None:
        """Checks that outputs, targets and the task fit together, by their shapes.

        Raises:
          StageError: They do not.
        """
        check_task(self.task, self.shapes(2)[-1], self.target_shapes(2))

    def with_units(self, units: Sequence[Unit], seed: int | None = None) -> Model:
        """Returns the model with its units in another form.

        Args:
          units: The units: of the same names, in the same order.
          seed: Root seed, from which frozen weights are drawn; None: as before.
        """
        made = copy.copy(self)
        made.units, made.programs, made._programs_by_task = tuple(units), {}, []
        made.frozen = Frozen(units, self.frozen.seed if seed is None else seed, self.frozen.base)
        return made

    def based(self, base: Base) -> Model:
        """Returns the model whose weights come from elsewhere, as far as they are there.

        Args:
          base: From a unit to its weights by path, of the right shapes; those that are missing are
            drawn from the seed.
        """
        made = copy.copy(self)
        made.frozen = Frozen(self.units, self.frozen.seed, base)
        return made

    def shapes(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Infers the input of every unit and the output of the last, without computing.

        Results are cached, since they are needed for every stage and size.

        Args:
          batch: Samples in the batch.

        Returns:
          len(units) + 1 abstract arrays; entry c is what crosses a cut at c.

        Raises:
          StageError: A unit does not accept what the one before it returns, or does not
            return one array.
        """
        known = batch, self.input_shape, bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        if known in self._shapes:
            return self._shapes[known]
        x: Any = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (batch, *self.input_shape), self.input_dtype
        )
        shapes, side = [x], self.side_shapes(batch)
        for unit in self.units:
            x = unit.infer(self.name, x, side)
            shapes.append(x)
        outputs = x.shape[1:]
        if self.classes and (outputs[-1] if outputs else 1) != self.classes:
            raise StageError(
                f"model {self.name!r}, unit {self.units[-1].name!r}: the last unit must return "
                f"outputs [batch, …, {self.classes}], got {x.shape}; check `classes`"
            )
        self._shapes[known] = tuple(shapes)
        return self._shapes[known]

    def side_shapes(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the abstract side inputs of a batch by name."""
        return _batched(self.sides, batch)

    def target_shapes(self, batch: int) -> PyTree:
        """Returns the abstract targets of a batch, as the loss gets them.

        Until the data are known, these are those that the task has for the model's outputs.

        Raises:
          StageError: Only the data could tell.
        """
        if self.targets is not None:
            return unwrapped(_batched(self.targets, batch))
        outputs = self.shapes(batch)[-1]
        like = self.task.targets.like(outputs.shape[1:])
        if like is None:
            raise StageError(
                f"model {self.name!r}: the targets of task {self.task.name!r} are not known"
            )
        dtype = jnp.int32 if like[1] == "i" else outputs.dtype
        return jax.ShapeDtypeStruct((batch, *like[0]), dtype)  # type: ignore[no-untyped-call]

    @property
    def signature(self) -> Signature:
        """Shapes and dtypes of a sample as the model receives it."""
        sides, targets = (
            {name: ArrayType(shape.shape, shape.dtype.name) for name, shape in sorted(some.items())}
            for some in (self.sides, self.targets or {})
        )
        return Signature(
            ArrayType(self.input_shape, self.input_dtype.name), sides, targets, self.classes
        )

    def receiving(self, targets: Mapping[str, ArrayType]) -> Model:
        """Returns the model for data with targets of these shapes and dtypes.

        Raises:
          StageError: They do not fit the task and the model's outputs.
        """
        made = copy.copy(self)
        made.targets = {
            name: jax.ShapeDtypeStruct(target.shape, jnp.dtype(target.dtype))  # type: ignore
            for name, target in targets.items()
        }
        made.check_task()
        return made


def _batched(
    samples: Mapping[str, jax.ShapeDtypeStruct], batch: int
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((batch, *sample.shape), sample.dtype)  # type: ignore
        for name, sample in samples.items()
    }


class Obstacle(NamedTuple):
    """A position in a network at which it cannot be cut.

    Attributes:
      after: Where it is: the module that was used last, and what follows.
      reason: Why the model cannot be cut there.
    """

    after: str
    reason: str


def parameter_count(model: Model) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for unit in model.units for leaf in unit.params.values())
