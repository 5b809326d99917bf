"""Any network, cut by tracing: from a module or a function to a model of named units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from stages.errors import StageError
from stages.model import Model, Obstacle
from stages.tracing.cutting import FEW, MORE, Cut, find_cuts, place
from stages.tracing.flat import flatten
from stages.tracing.flow import Flow
from stages.tracing.forms import batched
from stages.tracing.naming import name_units
from stages.tracing.networks import FunctionNetwork, LinenNetwork, Network, NnxNetwork
from stages.tracing.owners import assign
from stages.tracing.traced import Traced, TracedUnit
from stages.trees import PyTree

__all__ = ["trace"]


def trace(
    network: Any,
    example: PyTree,
    *,
    params: PyTree = None,
    name: str | None = None,
    classes: int | None = None,
    whole: bool = False,
) -> Model:
    """Returns a model of a network by tracing it and finding where it can be cut.

    A cut is a position at which one floating array is all that the rest of the network needs of the
    samples, and where no module has variables on both sides. The units between cuts are named by
    the modules whose variables they hold. Nothing is computed.

    Args:
      network: An NNX module, or a function from ``nnx.Rngs`` to one (its weights then depend on the
        seed); a Linen module; or, with ``params``, a function f(params, x) that returns an array.
        Parameters named train, training, deterministic, … are set by the engine, and so is a plain
        function's parameter ``key``.
      example: A batch [batch, …], abstract or not; or a dictionary of batches by parameter. The
        first entry is the input that is cut; the others are side inputs (masks, lengths), which
        every stage that needs them receives.
      params: A plain function's parameters, a pytree of arrays, or a function from a random key to
        them. Floating-point leaves are weights, all others stay unchanged.
      name: The model's name; by default that of the module or function.
      classes: Number of classes; by default the size of the output's last axis, 1 without one.
      whole: Whether a network without a cut is also a model, of a single unit (which can be trained
        where it is not cut: method=fl).

    Raises:
      StageError: The network cannot be traced or trained, or cannot be cut; the message says why
        and what to do.
    """
    inputs = _inputs(example)
    made = _adapt(network, params, name or _name_of(network), batched(inputs, FEW))
    few, more = (Flow(flatten(made, batched(inputs, n), True)) for n in (FEW, MORE))
    still = Flow(flatten(made, batched(inputs, FEW), False))
    _check_output(made.name, few, more, still)
    cuts, obstacles = find_cuts(few, more, tuple(made.params))
    cuts, obstacles = _kept(still, cuts, obstacles, made.name)
    if not cuts and not whole:
        why = "".join(f"; behind {obstacle.after}: {obstacle.reason}" for obstacle in obstacles[:1])
        raise StageError(
            f"model {made.name!r} cannot be cut anywhere{why or ': it has one module'}. Let one "
            "array carry all that later modules need, pass masks and lengths as side inputs, or "
            "train it whole: stages.trace(…, whole=True) with method=fl"
        )
    owners = assign(made, few, still, cuts, place(still, cuts, FEW, made.name))
    traced = Traced(made, inputs, cuts, [(owner.params, owner.state) for owner in owners])
    train, inference = traced.pieces(FEW, True), traced.pieces(FEW, False)
    units = [
        TracedUnit(
            unit, traced, index, paths,
            sorted({*train[index].sides, *inference[index].sides}), str(train[index].jaxpr),
        )
        for index, (unit, paths) in enumerate(name_units(owners))
    ]  # fmt: skip
    (_, main), *others = inputs.items()
    outputs = few.flat.output.aval.shape[1:]
    count = (outputs[-1] if outputs else 1) if classes is None else classes
    model = Model(made.name, units, main.shape, count, main.dtype)
    model.sides, model.obstacles = dict(others), obstacles
    model.shapes(1)
    return model


def _inputs(example: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract samples of a batch, by parameter.

    Raises:
      StageError: The example is not a batch.
    """
    given = dict(example) if isinstance(example, Mapping) else {"": example}
    for name, array in given.items():
        if not hasattr(array, "dtype") or not getattr(array, "shape", ()):
            raise StageError(
                f"the example{f' {name!r}' if name else ''} is a {type(array).__name__}, expected "
                "a batch: an array or jax.ShapeDtypeStruct [batch, …], or a dictionary of them"
            )
    if not given:
        raise StageError("the example is an empty dictionary: give at least one batch")
    return {
        name: jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            tuple(array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
        )
        for name, array in given.items()
    }


def _adapt(network: Any, params: PyTree, name: str, batch: Mapping[str, Any]) -> Network:
    """Wraps a network by its kind.

    Raises:
      StageError: It is not a network of a known kind.
    """
    if params is not None:
        if not callable(network) or isinstance(network, (nnx.Module, linen.Module)):
            raise StageError(
                f"model {name!r}: params= requires a plain function f(params, x), but the network "
                f"is a {type(network).__name__}, which holds its own: leave params out"
            )
        return FunctionNetwork(name, network, params)
    if isinstance(network, linen.Module):
        return LinenNetwork(name, network, dict(batch))
    if isinstance(network, nnx.Module) or callable(network):
        return NnxNetwork(name, network)
    raise StageError(
        f"model {name!r} is a {type(network).__name__}, expected an NNX or Linen module, a "
        "function from nnx.Rngs to an NNX module, or a function f(params, x) with params="
    )


def _name_of(network: Any) -> str:
    named: Callable[..., Any] | type = network if hasattr(network, "__name__") else type(network)
    return getattr(network, "name", None) or str(named.__name__).strip("<>")


def _check_output(name: str, few: Flow, more: Flow, still: Flow) -> None:
    """Checks that the output has a row per sample, in training and at inference.

    Raises:
      StageError: It is not.
    """
    shapes = [traced.flat.output.aval for traced in (few, more, still)]
    if not few.is_of_samples or not still.is_of_samples:
        raise StageError(f"model {name!r}: its output does not depend on its input")
    if not shapes[0].shape or [shape.shape[:1] for shape in shapes[:2]] != [(FEW,), (MORE,)]:
        raise StageError(
            f"model {name!r}: returns {shapes[0].dtype}{list(shapes[0].shape)} for {FEW} samples, "
            f"expected [{FEW}, …]: return a row per sample, and leave the loss to the task"
        )
    if not jnp.issubdtype(shapes[0].dtype, jnp.floating):
        raise StageError(
            f"model {name!r}: returns {shapes[0].dtype}, which has no gradient: return logits"
        )
    if shapes[0].shape != shapes[2].shape or shapes[0].dtype != shapes[2].dtype:
        raise StageError(
            f"model {name!r}: returns {shapes[0].dtype}{list(shapes[0].shape)} in training, but "
            f"{shapes[2].dtype}{list(shapes[2].shape)} at inference: let it return the same"
        )


def _kept(
    still: Flow, cuts: tuple[Cut, ...], obstacles: tuple[Obstacle, ...], name: str
) -> tuple[tuple[Cut, ...], tuple[Obstacle, ...]]:
    """Returns the cuts that also exist at inference, and the obstacles."""
    positions = place(still, cuts, FEW, name)
    missing = [cut for cut, position in zip(cuts, positions, strict=True) if position is None]
    reasons = [
        Obstacle(sorted(cut.left)[-1], "at inference the same array does not cross alone")
        for cut in missing
    ]
    return tuple(cut for cut in cuts if cut not in missing), (*obstacles, *reasons)
