"""The operators of a unit, derived from shapes alone.

A unit's forward pass is traced abstractly, with XLA's own operations, so that the result does not
depend on the machine. Convolutions, matrix products and pools are single operators; elementwise
work, reductions and copies, which compilers fuse, are summed over the unit; one ``call`` represents
the cost of calling a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.extend import core as jex_core

from stages import Model, make_draw
from stages.layers.formulation import Formulation, forced
from stages.trees import Atom, Equation, Jaxpr, PyTree

Array = npt.NDArray[np.float64]

KINDS = ("call", "conv", "depthwise", "matmul", "pool", "elementwise", "reduce", "layout")
#: Batch size at which units are traced; their work is linear in it.
TRACED = 8
_CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "scan", "while", "cond",
})  # fmt: skip
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr", "branches")
_FREE = frozenset({
    "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "stop_gradient", "iota", "copy",
    "optimization_barrier",
})  # fmt: skip
_LAYOUT = ("transpose", "concatenate", "pad", "gather", "slice", "dynamic_slice", "rev", "scatter",
           "sort", "dynamic_update_slice")  # fmt: skip


class Operator(NamedTuple):
    """One operator of a unit, for a whole micro-batch.

    Attributes:
      kind: One of ``KINDS``.
      flops: Floating-point operations of its forward.
      weight_bytes: Bytes of its weights.
      input_bytes: Bytes of its input.
      output_bytes: Bytes of its output.
      batch: Samples.
      kernel: Height of the kernel or window.
      stride: Stride of the window.
      inputs: Number of input channels.
      outputs: Number of output channels.
      pixels: Positions of the output per sample.
      repeats: Number of equal operations in the unit.
      pulled: Whether its input needs a cotangent (1) or is data (0).
    """

    kind: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    input_bytes: float = 0.0
    output_bytes: float = 0.0
    batch: float = 0.0
    kernel: float = 0.0
    stride: float = 0.0
    inputs: float = 0.0
    outputs: float = 0.0
    pixels: float = 0.0
    repeats: float = 1.0
    pulled: float = 1.0

    def at(self, batch: int) -> Operator:
        """Returns the same operator on micro-batches of another size."""
        ratio = batch / self.batch if self.batch else 1.0
        return self._replace(
            flops=self.flops * ratio,
            input_bytes=self.input_bytes * ratio,
            output_bytes=self.output_bytes * ratio,
            batch=self.batch * ratio,
        )


#: Length of an operator's row.
WIDTH = len(Operator._fields)
#: Number of fields after the kind that are operations and bytes.
SIZES = 4
#: Length of its features.
FEATURES = len(KINDS) + WIDTH - 1


def rows(operators: Iterable[Operator]) -> Array:
    """Returns operators as numbers, [operators, WIDTH] float64; a kind is its index."""
    found = [(KINDS.index(operator.kind), *operator[1:]) for operator in operators]
    return np.asarray(found, np.float64).reshape(-1, WIDTH)


def features(table: Array) -> Array:
    """Returns the features of operators for the network.

    Args:
      table: Operators as ``rows`` makes them, [operators, WIDTH].

    Returns:
      [operators, FEATURES] float64: the kind as zeros and a one, then the logarithms to base 2 of
      one plus each number; ``pulled`` as it is.
    """
    kinds = np.eye(len(KINDS))[table[:, 0].astype(int)]
    numbers = np.log2(1.0 + table[:, 1:-1])
    return np.concatenate([kinds, numbers, table[:, -1:]], axis=1)


def convolution(
    batch: int,
    side: int,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    pulled: bool = True,
) -> tuple[Operator, ...]:
    """Returns a square float32 convolution whose output has ``side`` rows and columns."""
    pixels = side * side
    return (
        Operator(
            "conv", 2.0 * batch * pixels * kernel * kernel * inputs * outputs,
            4.0 * kernel * kernel * inputs * outputs, 4.0 * batch * pixels * stride**2 * inputs,
            4.0 * batch * pixels * outputs, batch, kernel, stride, inputs, outputs, pixels, 1.0,
            float(pulled),
        ),
    )  # fmt: skip


def model_operators(
    model: Model, indices: Sequence[int] | None, batch: int
) -> list[tuple[Operator, ...]]:
    """Returns the operators of several units; equal units are traced only once.

    Args:
      model: The model.
      indices: The units' positions; None is all.
      batch: Samples of the micro-batch.
    """
    shapes = model.shapes(TRACED)
    chosen = range(len(model.units)) if indices is None else indices
    known: dict[Any, tuple[Operator, ...]] = {}
    found = []
    for index in chosen:
        unit = model.units[index]
        variables = sorted((path, str(leaf)) for path, leaf in unit.params.items())
        likeness = str(shapes[index]), tuple(variables), unit.graph, index == 0
        if likeness not in known:
            known[likeness] = _trace(model, index, shapes[index])
        found.append(tuple(one.at(batch) for one in known[likeness]))
    return found


class Tables:
    """A model's operators as tables, traced once for all sizes.

    Args:
      model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._traced = model_operators(model, None, TRACED)
        self._found: dict[int, list[Array]] = {}

    def at(self, batch: int) -> list[Array]:
        """Returns the operators of each unit for a micro-batch size, [operators, WIDTH]."""
        if batch not in self._found:
            self._found[batch] = [rows(o.at(batch) for o in unit) for unit in self._traced]
        return self._found[batch]


class _Origin(NamedTuple):
    """The origin of a value: whether it depends on samples, and whether it is differentiated."""

    data: bool
    active: bool


_NOTHING = _Origin(False, False)


def _trace(model: Model, index: int, shape: PyTree) -> tuple[Operator, ...]:
    """Traces one unit at ``TRACED`` samples."""
    unit = model.units[index]
    draw = make_draw(TRACED)

    shapes = model.side_shapes(TRACED)
    sides = {name: shapes[name] for name in unit.sides}

    def run(params: PyTree, state: PyTree, x: PyTree, sides: PyTree) -> PyTree:
        return unit.call(params, state, x, sides, draw=draw, train=True)[0]

    with forced(Formulation.XLA):
        closed = jax.make_jaxpr(run)(unit.weights, unit.state, shape, sides)
    walk = _Walk()
    params, state = len(jax.tree.leaves(unit.weights)), len(jax.tree.leaves(unit.state))
    origins = [_Origin(False, True)] * params + [_NOTHING] * state + [_Origin(True, index > 0)]
    origins += [_Origin(True, False)] * len(sides)
    walk.run(closed.jaxpr, origins)
    return walk.operators()


class _Walk:
    """Walks a jaxpr and records its operations on samples."""

    def __init__(self) -> None:
        self._single: list[Operator] = []
        self._sums: dict[str, Operator] = {}
        self._times = 1  # of what is walked through now: steps of the loops around it

    def operators(self) -> tuple[Operator, ...]:
        """Returns the operators, the call first."""
        sums = (self._sums[kind] for kind in KINDS if kind in self._sums)
        return (Operator("call"), *self._single, *sums)

    def run(self, jaxpr: Jaxpr, origins: Sequence[_Origin]) -> list[_Origin]:
        """Walks one jaxpr; returns the origins of its results."""
        known: dict[Atom, _Origin] = dict(zip(jaxpr.invars, origins, strict=True))

        def origin(value: Atom) -> _Origin:
            return _NOTHING if isinstance(value, jex_core.Literal) else known.get(value, _NOTHING)

        for eqn in jaxpr.eqns:
            given = [origin(value) for value in eqn.invars]
            whole = _Origin(any(one.data for one in given), any(one.active for one in given))
            results = [whole] * len(eqn.outvars)
            inner = _inner(eqn) if eqn.primitive.name in _CALLS else None
            if inner is not None:
                # Leading operands that the inner jaxpr lacks (the index of a branch) are dropped;
                # leading constants that only it has have no origin.
                missing = max(len(inner.invars) - len(given), 0)
                last = given[max(len(given) - len(inner.invars), 0) :]
                times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                self._times *= times
                results = self.run(inner, [_NOTHING] * missing + last)
                self._times //= max(times, 1)
                results = [*results, *[whole] * len(eqn.outvars)][: len(eqn.outvars)]
            elif whole.data:
                self._note(eqn, given)
            known.update(zip(eqn.outvars, results, strict=True))
        return [origin(value) for value in jaxpr.outvars]

    def _note(self, eqn: Equation, given: Sequence[_Origin]) -> None:
        """Adds one operation on samples."""
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if name in _FREE or not getattr(out, "shape", None):
            return
        if name == "conv_general_dilated":
            self._single += [_convolution(eqn, given)] * self._times
        elif name == "dot_general":
            self._single += [_product(eqn, given)] * self._times
        elif name.startswith(("reduce_window", "select_and")):
            self._single += [_pool(eqn, given)] * self._times
        else:
            self._add(name, eqn)

    def _add(self, name: str, eqn: Equation) -> None:
        """Adds to the sums of operations that compilers fuse."""
        kind = "elementwise"
        if name.startswith(("reduce", "arg", "cum")):
            kind = "reduce"
        elif name.startswith(_LAYOUT):
            kind = "layout"
        so_far = self._sums.get(kind, Operator(kind, batch=TRACED, repeats=0.0))
        came = sum(_bytes(v.aval) for v in eqn.invars if hasattr(v, "aval"))
        went = sum(_bytes(v.aval) for v in eqn.outvars)
        self._sums[kind] = so_far._replace(
            flops=so_far.flops + self._times * sum(math.prod(v.aval.shape) for v in eqn.outvars),
            input_bytes=so_far.input_bytes + self._times * came,
            output_bytes=so_far.output_bytes + self._times * went,
            repeats=so_far.repeats + self._times,
        )


def _inner(eqn: Equation) -> Jaxpr:
    """Returns the jaxpr that an operation calls, the first of several branches."""
    for name in _INNER:
        found = eqn.params.get(name)
        found = found[0] if isinstance(found, tuple | list) and found else found
        found = getattr(found, "jaxpr", found)
        if isinstance(found, jex_core.Jaxpr):
            return found
    return None


def _convolution(eqn: Equation, given: Sequence[_Origin]) -> Operator:
    x, kernel = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    numbers = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    sizes = [kernel.shape[axis] for axis in numbers.rhs_spec[2:]]
    outputs, inputs = (kernel.shape[axis] for axis in numbers.rhs_spec[:2])
    batch = out.shape[numbers.out_spec[0]]
    return Operator(
        "depthwise" if groups > 1 else "conv",
        2.0 * math.prod(out.shape) * math.prod(sizes) * inputs,
        _bytes(kernel), _bytes(x), _bytes(out), batch, max(sizes, default=1),
        max(eqn.params["window_strides"], default=1), inputs * groups, outputs,
        math.prod(out.shape) / (batch * outputs), 1.0, float(given[0].active),
    )  # fmt: skip


def _product(eqn: Equation, given: Sequence[_Origin]) -> Operator:
    x, y = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(x.shape[axis] for axis in contracted)
    weights = [v for v, one in zip((x, y), given, strict=True) if not one.data]
    came = sum(_bytes(v) for v, one in zip((x, y), given, strict=True) if one.data)
    active = any(one.active for one in given if one.data)
    outputs = out.shape[-1]
    return Operator(
        "matmul", 2.0 * math.prod(out.shape) * inner, sum(map(_bytes, weights)), came, _bytes(out),
        TRACED, 1.0, 1.0, inner, outputs, math.prod(out.shape) / (TRACED * outputs), 1.0,
        float(active),
    )  # fmt: skip


def _pool(eqn: Equation, given: Sequence[_Origin]) -> Operator:
    x, out = eqn.invars[0].aval, eqn.outvars[0].aval
    window = eqn.params.get("window_dimensions", (1,))
    strides = eqn.params.get("window_strides", (1,))
    channels = out.shape[-1]
    return Operator(
        "pool", 1.0 * math.prod(out.shape) * math.prod(window), 0.0, _bytes(x), _bytes(out), TRACED,
        max(window), max(strides), channels, channels,
        math.prod(out.shape) / (TRACED * channels), 1.0, float(given[0].active),
    )  # fmt: skip


def _bytes(aval: Any) -> float:
    """Returns the bytes of an abstract array."""
    if not hasattr(aval, "shape"):
        return 0.0
    return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)
