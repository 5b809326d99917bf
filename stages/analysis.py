"""Sizes and operations of each unit and stage of a model, found without running it.

Shapes come from abstract evaluation, floating-point operations from XLA's analysis of the programs
before they are compiled. A residual is counted once, even if it is held by reference (the input
that a stage keeps for its backward pass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.micro_batch_context import make_draw
from stages.model import Model
from stages.residuals import Residuals
from stages.stage import Stage, split
from stages.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Facts:
    """Sizes and operations of a run of units for one batch.

    Attributes:
      units: Names of the units.
      parameters: Number of trainable parameters.
      parameter_bytes: Bytes of the parameters.
      state_bytes: Bytes of the batch statistics.
      output_shape: Shape of the output.
      output_bytes: Bytes of the output, which cross a cut after the units in each direction.
      residual_bytes: Bytes of the residuals.
      forward_flops: Floating-point operations of the forward pass.
      backward_flops: Floating-point operations of the backward pass.
    """

    units: tuple[str, ...]
    parameters: int
    parameter_bytes: int
    state_bytes: int
    output_shape: tuple[int, ...]
    output_bytes: int
    residual_bytes: int
    forward_flops: float
    backward_flops: float


def unit_facts(model: Model, batch: int) -> tuple[Facts, ...]:
    """Returns the facts of every unit of a model.

    Args:
      model: The model.
      batch: Samples in the batch.
    """
    return stage_facts(model, tuple(range(1, len(model.units))), batch)


def stage_facts(
    model: Model,
    cuts: Sequence[int],
    batch: int,
    *,
    rematerialise: bool | Sequence[bool] = False,
) -> tuple[Facts, ...]:
    """Returns the facts of every stage of a model that is cut.

    Args:
      model: The model.
      cuts: The cuts, as for ``split``.
      batch: Samples in the batch.
      rematerialise: Stages that recompute their forward pass, as for ``split``.
    """
    bounds = (0, *cuts, len(model.units))
    shapes = model.shapes(batch)
    parts = split(model, cuts, rematerialise=rematerialise)
    return tuple(
        _facts(model, part, bounds[i], bounds[i + 1], shapes[bounds[i]], batch)
        for i, part in enumerate(parts)
    )


def residual_bytes(model: Model, batch: int) -> tuple[int, ...]:
    """Returns the residuals of each unit, without running it.

    Args:
      model: The model.
      batch: Samples in the batch.
    """
    shapes = model.shapes(batch)
    parts = split(model, tuple(range(1, len(model.units))))
    return tuple(
        _kept_bytes(_kept(model, part, i, i + 1, shapes[i], batch)[1])
        for i, part in enumerate(parts)
    )


def _kept(
    model: Model, stage: Stage, start: int, stop: int, x: PyTree, batch: int
) -> tuple[PyTree, Residuals]:
    """Returns the abstract output of a stage and its residuals."""
    units = model.units[start:stop]
    params = {unit.name: unit.params for unit in units}
    state = {unit.name: unit.state for unit in units}
    side = stage.side_shapes(model, batch)
    return stage.forward_shapes(params, state, x, make_draw(batch), side)


def _fixed(model: Model, stage: Stage) -> PyTree:
    """Returns the abstract frozen weights of a stage."""
    return model.frozen.shapes(stage.unit_names)


def _facts(model: Model, stage: Stage, start: int, stop: int, x: PyTree, batch: int) -> Facts:
    """Traces the forward and the backward pass of one stage."""
    units = model.units[start:stop]
    params = {unit.name: unit.params for unit in units}
    state = {unit.name: unit.state for unit in units}
    forward, backward = stage.programs.forward, stage.programs.backward
    draw, side, fixed = make_draw(batch), stage.side_shapes(model, batch), _fixed(model, stage)
    y, kept = _kept(model, stage, start, stop, x, batch)
    params_of = [leaf for unit in units for leaf in unit.params.values()]
    return Facts(
        units=stage.unit_names,
        parameters=sum(leaf.size for leaf in params_of),
        parameter_bytes=_bytes(params_of),
        state_bytes=_bytes(state),
        output_shape=tuple(y.shape),
        output_bytes=_bytes(y),
        residual_bytes=_kept_bytes(kept),
        forward_flops=_flops(forward.lower(params, state, x, draw, side, fixed)),
        backward_flops=_flops(backward.lower(params, kept, y, params, np.bool_(False), fixed)),
    )


def _bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, abstract or not."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _kept_bytes(kept: Residuals) -> int:
    """Bytes of residuals, without the scalars of a micro-batch."""
    return _bytes([leaf for leaf in jax.tree.leaves(kept) if getattr(leaf, "shape", None)])


def _flops(lowered: Any) -> float:
    """Floating-point operations by XLA's analysis; 0 where the platform offers none."""
    analysis = lowered.cost_analysis() or {}
    if isinstance(analysis, list):
        analysis = analysis[0] if analysis else {}
    return float(analysis.get("flops", 0.0))
