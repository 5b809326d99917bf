"""Units of a traced network: pieces of its equations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.micro_batch_context import MicroBatchContext
from stages.tracing.cutting import FEW, Cut, place
from stages.tracing.flat import Flat, flatten
from stages.tracing.flow import Flow
from stages.tracing.forms import TracedForm, batched, reshaped
from stages.tracing.networks import Network
from stages.trees import Arrays, Atom, Jaxpr
from stages.unit import Unit

#: An array, abstract or not.
AnyArray: TypeAlias = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A unit's equations for a number of samples.

    Attributes:
      jaxpr: (weights, state, scalars of the draw, side inputs, samples or boundary) to (output,
        new state), all flat, by path in order.
      consts: Its constants.
      sides: Names of the side inputs.
    """

    jaxpr: Jaxpr
    consts: tuple[jax.Array, ...]
    sides: tuple[str, ...]


class Traced:
    """A network with its cuts, traced once for each number and length of samples.

    Attributes:
      network: The network.
      owners: For each unit the paths of its weights and its state.
      forms: The network for samples of each length, by the length; the one it was traced with is
        the first, and the only one unless there are others to expect.
    """

    def __init__(
        self,
        network: Network,
        inputs: Mapping[str, jax.ShapeDtypeStruct],
        cuts: Sequence[Cut],
        owners: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    ) -> None:
        self.network, self.owners = network, tuple(owners)
        main, *_ = inputs.values()
        self.forms = {main.shape[0] if main.shape else 0: TracedForm.of(inputs, cuts)}
        self._pieces: dict[Any, tuple[Piece, ...]] = {}

    @property
    def base(self) -> TracedForm:
        """The form that the network was traced with."""
        return next(iter(self.forms.values()))

    def expect_lengths(self, lengths: Sequence[int]) -> None:
        """Traces the network for samples of other lengths; see ``Unit.expect_lengths``."""
        for length in lengths:
            if length not in self.forms:
                self.forms[length] = reshaped(
                    self.network, self.base, next(iter(self.forms)), length
                )
        for index in range(len(self.owners)):
            self._check_alike(index)

    def _check_alike(self, index: int) -> None:
        """Checks that a unit computes the same with all lengths that its inputs do not tell apart.

        Those of earlier runs count, too: ``length_of`` finds one of them for an equal input.

        Raises:
          StageError: It does not.
        """
        first: dict[Any, tuple[int, str]] = {}
        for length, form in self.forms.items():
            piece = self.pieces(FEW, True, length=length)[index]
            sides = tuple(form.inputs[name].shape for name in piece.sides)
            text = str(piece.jaxpr) + "".join(map(_content, piece.consts))
            other, expected = first.setdefault(
                (form.boundaries[index].shape, sides), (length, text)
            )
            if text != expected:
                raise StageError(
                    f"model {self.network.name!r}: behind "
                    f"{sorted(form.cuts[index - 1].left)[-1]} it computes something else with "
                    f"sequences of {length} than with {other}, although nothing else crosses the "
                    "cut: let it count positions by a mask or lengths, and not by the shape"
                )

    def length_of(self, index: int, x: AnyArray, side: Mapping[str, AnyArray]) -> int | None:
        """Returns the length of the samples that a unit's inputs are of; None if it is none.

        Args:
          index: The unit's index.
          x: What it gets from the unit before it, abstract or not.
          side: Side inputs by name, abstract or not.
        """
        samples = int(x.shape[0])
        for length, form in self.forms.items():
            expected = {name: (samples, *one.shape) for name, one in form.inputs.items()}
            if x.shape == form.boundaries[index].outside(samples).shape and all(
                tuple(one.shape) == expected[name] for name, one in side.items() if name in expected
            ):
                return length
        return None

    def pieces(
        self,
        samples: int,
        train: bool,
        inverse_dtype: DTypeLike | None = None,
        length: int | None = None,
    ) -> tuple[Piece, ...]:
        """Returns every unit's equations for a number of samples.

        Args:
          samples: The number of samples.
          train: Training or inference.
          inverse_dtype: Dtype of ``MicroBatchContext.inverse_batch``.
          length: Their length; None for that which the network was traced with.

        Raises:
          StageError: The network has another structure with this number of samples.
        """
        dtype = jnp.dtype(inverse_dtype or jnp.float32)
        form = self.base if length is None else self.forms[length]
        key = samples, form, train, dtype if train else None, jnp.result_type(float)
        if key not in self._pieces:
            batch = batched(form.inputs, samples)
            self._pieces[key] = self._cut(
                Flow(flatten(self.network, batch, train, dtype)), form, samples, train
            )
        return self._pieces[key]

    def _cut(self, flow: Flow, form: TracedForm, samples: int, train: bool) -> tuple[Piece, ...]:
        positions = place(flow, form.cuts, samples, self.network.name)
        known = [position for position in positions if position is not None]
        if known != sorted(known) or len(known) < len(positions):
            index = positions.index(None) if None in positions else 0
            raise StageError(
                f"model {self.network.name!r}: with {samples} samples in "
                f"{'training' if train else 'inference'} it cannot be cut behind "
                f"{sorted(form.cuts[index].left)[-1]}, although it can with other "
                "numbers: let it compute the same for every number of samples"
            )
        bounds = [0, *known, flow.length + 1]
        return tuple(
            _piece(flow, start, stop, *own)
            for (start, stop), own in zip(itertools.pairwise(bounds), self.owners, strict=True)
        )


class TracedUnit(Unit):
    """A unit that is a piece of a traced network.

    Attributes:
      traced: The network.
      index: The unit's index among its units.
      names: The path in the network of each of the unit's weights and of its state, by path.
    """

    traced: Traced
    index: int
    names: dict[str, str]

    def __init__(
        self,
        name: str,
        traced: Traced,
        index: int,
        names: Mapping[str, str],
        sides: Sequence[str],
        graph: Any,
    ) -> None:
        network = traced.network
        own = {path: names[path] for path in names}
        super().__init__(
            name,
            graph,
            {path: network.params[full] for path, full in own.items() if full in network.params},
            {path: network.state[full] for path, full in own.items() if full in network.state},
            sides=tuple(sides),
        )
        for field, value in (("traced", traced), ("index", index), ("names", own)):
            object.__setattr__(self, field, value)

    @property
    def draws(self) -> bool:
        """Whether its equations use more of the draw than the share; see ``Unit.draws``."""
        jaxpr = self.traced.pieces(FEW, True)[self.index].jaxpr
        weights, statistics = self.traced.owners[self.index]
        first = len(weights) + len(statistics)
        scalars = jaxpr.invars[first : first + len(MicroBatchContext._fields)]
        names = dict(zip(MicroBatchContext._fields, scalars, strict=True))
        del names["inverse_batch"]
        used = {
            v
            for equation in jaxpr.eqns
            for v in equation.invars
            if not isinstance(v, jex_core.Literal)
        }
        return any(var in used for var in names.values())

    def expect_lengths(self, lengths: Sequence[int]) -> None:
        """Traces the network for them; see ``Unit.expect_lengths``."""
        self.traced.expect_lengths(lengths)

    def draw(self, seed: int, drawn: dict[Any, Any]) -> tuple[Arrays, Arrays]:
        """Draws the whole network once for all of its units; see ``Unit.draw``."""
        if self.traced not in drawn:
            drawn[self.traced] = self.traced.network.draw(seed)
        params, state = drawn[self.traced]
        return (
            {path: params[self.names[path]] for path in self.weights},
            {path: state[self.names[path]] for path in self.state},
        )

    def matching(self, chosen: Any) -> frozenset[str]:
        """Returns the whole network's answer for this unit; see ``Unit.matching``."""
        matching = self.traced.network.matching(chosen)
        return frozenset(path for path in self.weights if self.names[path] in matching)

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
        """Evaluates the unit's equations; see ``Unit.call``."""
        samples = int(x.shape[0])
        length = self._length(x, side)
        form = self.traced.forms[length]
        scalars = draw if train else None
        inverse = None if scalars is None else jnp.result_type(scalars.inverse_batch)
        piece = self.traced.pieces(samples, train, inverse, length)[self.index]
        function = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(piece.jaxpr, piece.consts))
        weights, statistics = self.traced.owners[self.index]
        params = {self.names[path]: array for path, array in params.items()}
        held = {self.names[path]: array for path, array in state.items()}
        y, *after = function(
            *(params[path] for path in weights),
            *(held[path] for path in statistics),
            *(scalars or ()),
            *(side[name] for name in piece.sides),
            form.boundaries[self.index].enter(x),
        )
        if self.index < len(form.cuts):
            y = form.boundaries[self.index + 1].leave(y)
        if not train:
            return y, state
        left = dict(zip(statistics, after, strict=True))
        return y, {path: left[self.names[path]] for path in state}

    def infer(
        self, model: str, x: jax.ShapeDtypeStruct, side: Mapping[str, jax.ShapeDtypeStruct]
    ) -> jax.ShapeDtypeStruct:
        """Reads the shape from the trace; see ``Unit.infer``."""
        samples, length = int(x.shape[0]), self._length(x, side)
        form = self.traced.forms[length]
        if self.index < len(form.cuts):
            return form.boundaries[self.index + 1].outside(samples)
        pieces = self.traced.pieces(samples, train=False, length=length)
        aval = pieces[self.index].jaxpr.outvars[0].aval
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)  # type: ignore[no-untyped-call]

    def _length(self, x: AnyArray, side: Mapping[str, AnyArray]) -> int:
        """Returns the length of the samples that the unit's inputs are of.

        Raises:
          StageError: They are of none that is expected.
        """
        own = {name: side[name] for name in self.sides if name in side}
        length = self.traced.length_of(self.index, x, own)
        if length is None:
            expected = self.traced.base.boundaries[self.index].outside(int(x.shape[0])).shape
            sides = "".join(f", {name} {list(one.shape)}" for name, one in own.items())
            raise StageError(
                f"unit {self.name!r}: got an array {list(x.shape)}{sides}, expected "
                f"{list(expected)}"
            )
        return length


def _content(const: jax.Array) -> str:
    """Returns the values of a constant as text."""
    if jnp.issubdtype(const.dtype, jax.dtypes.prng_key):
        const = jax.random.key_data(const)
    return str(np.asarray(const).tolist())


def _piece(
    flow: Flow, start: int, stop: int, weights: Sequence[str], statistics: Sequence[str]
) -> Piece:
    """Returns the equations of a unit between two positions."""
    flat = flow.flat
    main, *others = flat.inputs.items()
    source = main[1] if start == 0 else flow.live(start)[0]
    target = flat.output if stop > flow.length else flow.live(stop)[0]
    states = [flat.state_after[path] for path in statistics] if flat.draw else []
    outputs = [target, *states]
    own = [*(flat.params[path] for path in weights), *(flat.state[path] for path in statistics)]
    given = {*own, *flat.draw, *(var for _, var in others), source, *flat.jaxpr.constvars}
    equations = []
    needed = {var for var in outputs if not isinstance(var, jex_core.Literal)}
    inside = {step.index for step in flow.steps if start < max(step.level, 1) <= stop}
    for index in reversed(range(len(flat.jaxpr.eqns))):
        equation = flat.jaxpr.eqns[index]
        if (equation.effects and index in inside) or any(
            var in needed and var not in given for var in equation.outvars
        ):
            equations.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, jex_core.Literal))
    made = {var for equation in equations for var in equation.outvars}
    foreign = needed - made - given
    if foreign:
        raise StageError(_foreign(flat, foreign))
    sides = [(name, var) for name, var in others if var in needed]
    consts = [
        (var, value)
        for var, value in zip(flat.jaxpr.constvars, flat.consts, strict=True)
        if var in needed
    ]
    invars = [*own, *flat.draw, *(var for _, var in sides), source]
    jaxpr = flat.jaxpr.replace(
        constvars=[var for var, _ in consts], invars=invars, outvars=outputs,
        eqns=equations[::-1],
    )  # fmt: skip
    return Piece(jaxpr, tuple(value for _, value in consts), tuple(name for name, _ in sides))


def _foreign(flat: Flat, foreign: set[Atom]) -> str:
    """Returns a message about variables of other units that a unit uses."""
    paths = {var: path for path, var in {**flat.params, **flat.state}.items()}
    names = sorted(paths[var] for var in foreign if var in paths)
    return (
        f"variable {names[0] if names else '?'} is used in training on one side of a cut and at "
        "inference on the other: let both use it in the same place"
    )
