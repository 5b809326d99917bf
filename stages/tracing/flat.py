"""A network's call as one flat list of equations.

Calls of jitted functions are inlined, since a cut may lie inside. Functions
with custom derivatives are left whole (the gradient of ReLU at 0 would change from 0 to 1/2),
and so are loops, whose equations run more than once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.foreign import describe
from stages.micro_batch_context import MicroBatchContext
from stages.tracing.networks import Network, Shapes
from stages.trees import Atom, Equation, Jaxpr, PyTree

_CALLS = ("jit", "pjit", "closed_call", "core_call")


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A call of a network, traced for a number of samples.

    Attributes:
      jaxpr: The equations.
      consts: Values of its constants.
      params: For each weight's path its variable in the jaxpr.
      state: For each state's path its variable.
      draw: Variables of the micro-batch's scalars; none at inference.
      inputs: For each input's name its variable; the first is the input that is cut.
      output: The network's output.
      state_after: For each state's path its value after the call.
    """

    jaxpr: Jaxpr
    consts: tuple[jax.Array, ...]
    params: dict[str, Atom]
    state: dict[str, Atom]
    draw: tuple[Atom, ...]
    inputs: dict[str, Atom]
    output: Atom
    state_after: dict[str, Atom]


def flatten(
    network: Network, inputs: Shapes, train: bool, inverse_dtype: DTypeLike = jnp.float32
) -> Flat:
    """Traces a call.

    Args:
      network: The network.
      inputs: Abstract batches by name.
      train: Training or inference.
      inverse_dtype: Dtype of ``MicroBatchContext.inverse_batch``.

    Raises:
      StageError: The network cannot be called so, or does not return an array.
    """

    def run(params: PyTree, state: PyTree, draw: PyTree, inputs: PyTree) -> PyTree:
        y, after = network.call(
            params, state, inputs, draw=MicroBatchContext(*draw) if train else None, train=train
        )
        outputs = jax.tree.leaves(y)
        if len(outputs) != 1 or outputs[0] is not y:
            raise StageError(
                f"model {network.name!r}: returned {_kind(y)}, expected a single array: return "
                "what the loss is computed from, and sow the rest"
            )
        return y, {path: after[path] for path in network.state}

    scalar = jax.ShapeDtypeStruct((), jnp.uint32)  # type: ignore[no-untyped-call]
    inverse = jax.ShapeDtypeStruct((), inverse_dtype)  # type: ignore[no-untyped-call]
    draw = (inverse, *[scalar] * (len(MicroBatchContext._fields) - 1)) if train else ()
    given = (network.params, network.state, draw, inputs)
    try:
        closed = _inlined(jax.make_jaxpr(run)(*given))
    except StageError:
        raise
    except Exception as error:  # user code: whatever it raises is reported with its line
        said = ", ".join(f"{n} {one.dtype}{list(one.shape)}".strip() for n, one in inputs.items())
        raise StageError(
            f"model {network.name!r}: cannot be traced in {'training' if train else 'inference'} "
            f"with {said}: {describe(error)}{_hint(error)}"
        ) from error
    params, state, scalars, batches = jax.tree.unflatten(
        jax.tree.structure(given), closed.jaxpr.invars
    )
    output, *after = closed.jaxpr.outvars
    return Flat(
        closed.jaxpr, tuple(closed.consts), params, state, tuple(scalars),
        {name: batches[name] for name in inputs}, output,
        dict(zip(sorted(network.state), after, strict=True)),
    )  # fmt: skip


def _inlined(closed: Jaxpr) -> PyTree:
    """Traces a jaxpr again, with calls inlined."""

    def run(*arguments: PyTree) -> list[PyTree]:
        return _evaluate(closed.jaxpr, closed.consts, arguments)

    return jax.make_jaxpr(run)(*closed.in_avals)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[PyTree], arguments: Sequence[PyTree]) -> list[PyTree]:
    """Evaluates equation by equation, and steps into calls."""
    values: dict[Atom, PyTree] = {}

    def read(atom: Atom) -> PyTree:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        taken = [read(atom) for atom in equation.invars]
        inner = _called(equation)
        if inner is not None:
            made = _evaluate(inner.jaxpr, inner.consts, taken)
        else:
            # A jaxpr of a single equation: binding a primitive differs between versions.
            single = jaxpr.replace(
                constvars=[], invars=_distinct(equation.invars), outvars=list(equation.outvars),
                eqns=[equation], effects=equation.effects,
            )  # fmt: skip
            known = dict(zip(map(id, equation.invars), taken, strict=True))
            function = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(single, []))
            made = function(*(known[id(atom)] for atom in single.invars))
        values.update(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Equation) -> PyTree:
    """Returns the function that an equation calls, if it is only a call."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return inner if isinstance(inner, jex_core.ClosedJaxpr) else None


def _distinct(atoms: Sequence[Atom]) -> list[Atom]:
    """Returns the variables among atoms, each once."""
    found = {id(atom): atom for atom in atoms if not isinstance(atom, jex_core.Literal)}
    return list(found.values())


def _kind(y: PyTree) -> str:
    if isinstance(y, (tuple, list, dict)):
        return f"a {type(y).__name__} of {len(y)}"
    return f"a {type(y).__name__}"


def _hint(error: BaseException) -> str:
    """Returns a hint for frequent errors of tracing."""
    if isinstance(
        error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError
    ):
        return (
            "; it computes with values while it is traced: use jnp and jax.lax instead of numpy, "
            "if and float()"
        )
    return ""
