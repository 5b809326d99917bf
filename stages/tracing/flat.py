"""A network's call as one flat list of equations.

Calls of jitted functions are inlined, since a cut may lie inside. Functions
with custom derivatives are left whole (the gradient of ReLU at 0 would change from 0 to 1/2),
and so are loops, whose equations run more than once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stages.equations import evaluate
from stages.errors import StageError
from stages.foreign import describe
from stages.micro_batch_context import MicroBatchContext
from stages.tracing.networks import Network, Shapes
from stages.trees import Atom, Jaxpr, PyTree


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
        said = ", ".join(
            f"{n} {array.dtype}{list(array.shape)}".strip() for n, array in inputs.items()
        )
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
        return evaluate(closed.jaxpr, closed.consts, arguments)

    return jax.make_jaxpr(run)(*closed.in_avals)


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
