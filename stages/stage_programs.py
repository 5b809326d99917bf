"""Compiled functions of runs of units: what ``Stage`` calls, traced here and jitted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from stages import release as private
from stages.accumulation import Fresh, add
from stages.layers.reformulation import reformulated
from stages.micro_batch_context import MicroBatchContext
from stages.model import Model
from stages.program import Program
from stages.release import PrivateRelease
from stages.residuals import Residuals, pull_back, run_forward
from stages.tasks.per_sample import total_loss
from stages.tasks.task import Task
from stages.trees import PyTree, Variables
from stages.unit import Unit

Metrics: TypeAlias = dict[str, jax.Array]
#: Side inputs of a micro-batch by name: they have no cotangent.
Side: TypeAlias = Mapping[str, jax.Array]
NO_SIDE: Side = {}
_NOTHING: Variables = {}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a run of units; shared by all stages over the same units."""

    forward: Program
    backward: Program
    loss: Program
    predict: Program


def build_programs(
    model: Model, start: int, stop: int, rematerialise: bool, release: PrivateRelease | None
) -> Programs:
    """Builds the jitted functions of a run of units, once per model.

    Args:
      model: The model, which keeps them.
      start: Index of the first unit.
      stop: Index after the last one.
      rematerialise: Whether backward passes compute their forward pass again.
      release: What of the stage is clipped and noised before it leaves; None: nothing.
    """
    cached = model.programs.get((start, stop, rematerialise, release))
    if cached is not None:
        return cached  # type: ignore[no-any-return]
    units = model.units[start:stop]
    train: Callable[..., Any] = partial(_run, units, train=True)
    if rematerialise:
        train = jax.checkpoint(train)
    programs = Programs(
        forward=Program(partial(_forward, train, start == 0)),
        backward=Program(partial(_backward, start == 0), donate_argnums=(3,)),
        loss=Program(partial(_loss, train, model.task, start == 0), donate_argnums=(5,)),
        predict=Program(partial(_predict, units)),
    )
    if release is not None:
        programs = _private_programs(programs, units, model.task, start == 0, release)
    model.programs[start, stop, rematerialise, release] = programs
    return programs


def _run(
    units: Sequence[Unit],
    params: Variables,
    fixed: Variables,
    state: Variables,
    x: jax.Array,
    draw: MicroBatchContext | None,
    side: Side,
    train: bool,
) -> tuple[jax.Array, Variables]:
    """Chains units; returns the output and the new batch statistics."""
    after: Variables = {}
    for unit in units:
        call: Callable[..., Any] = partial(unit.call, train=train)
        if not unit.is_ours:
            call = reformulated(call)
        weights = {**params[unit.name], **fixed.get(unit.name, {})}
        x, after[unit.name] = call(weights, state[unit.name], x, side, draw=draw)
    return x, after


def _private_programs(
    plain: Programs,
    units: Sequence[Unit],
    task: Task,
    is_first: bool,
    release: PrivateRelease,
) -> Programs:
    """Returns the functions of a stage whose weights are released as well as what it sends."""
    train: Callable[..., Any] = partial(_run, units, train=True)
    alone = any(unit.draws for unit in units)
    return dataclasses.replace(
        plain,
        forward=Program(partial(private.forward, train, release, alone)),
        backward=Program(partial(private.backward, train, release), donate_argnums=(3,)),
        loss=Program(
            partial(private.loss, train, partial(total_loss, task), release, is_first),
            donate_argnums=(5,),
        ),
    )


def _predict(
    units: Sequence[Unit],
    params: Variables,
    state: Variables,
    x: PyTree,
    side: Side = NO_SIDE,
    fixed: Variables = _NOTHING,
) -> jax.Array:
    """Traced body of ``Stage.predict``."""
    return _run(units, params, fixed, state, x, None, side, False)[0]


def _forward(
    train: Callable[..., Any],
    is_first: bool,
    params: Variables,
    state: Variables,
    x: PyTree,
    draw: MicroBatchContext,
    side: Side = NO_SIDE,
    fixed: Variables = _NOTHING,
) -> tuple[jax.Array, Variables, Residuals]:
    """Traced body of ``Stage.forward``."""
    if is_first:
        # The samples need no cotangent and are not differentiated.
        return run_forward(
            lambda params, fixed, rest, _: train(params, fixed, *rest),
            params,
            fixed,
            (state, x, draw, side),
            None,
        )
    return run_forward(
        lambda params, fixed, rest, x: train(params, fixed, rest[0], x, *rest[1:]),
        params,
        fixed,
        (state, draw, side),
        x,
    )


def _backward(
    is_first: bool,
    params: Variables,
    residuals: Residuals,
    cotangent: PyTree,
    accumulated: Variables | None,
    fresh: Fresh,
    fixed: Variables = _NOTHING,
) -> tuple[jax.Array, Variables]:
    """Traced body of ``Stage.backward``."""
    gradient, x_cotangent = pull_back(residuals, params, fixed, cotangent)
    if is_first:
        # The samples need no cotangent, but a caller has to be able to wait for this computation
        # without holding the accumulator, which the next computation donates.
        x_cotangent = jnp.zeros((), jnp.int32)
    return x_cotangent, add(accumulated, gradient, fresh)


def _loss(
    train: Callable[..., Any],
    task: Task,
    is_first: bool,
    params: Variables,
    state: Variables,
    x: PyTree,
    targets: PyTree,
    draw: MicroBatchContext,
    accumulated: Variables | None,
    fresh: Fresh,
    side: Side = NO_SIDE,
    fixed: Variables = _NOTHING,
    counted: jax.Array | None = None,
) -> tuple[Metrics, jax.Array | None, Variables, Variables]:
    """Traced body of ``Stage.loss``."""

    def mean_loss(params: Variables, x: PyTree) -> tuple[jax.Array, tuple[Metrics, Variables]]:
        outputs, after = train(params, fixed, state, x, draw, side)
        real = None if counted is None else jnp.arange(len(outputs)) < counted
        total, metrics = total_loss(task, outputs, targets, real)
        return total * draw.inverse_batch, (metrics, after)

    differentiated = (0,) if is_first else (0, 1)
    gradients, (metrics, after) = jax.grad(mean_loss, differentiated, has_aux=True)(params, x)
    x_cotangent = None if is_first else gradients[1]
    return metrics, x_cotangent, add(accumulated, gradients[0], fresh), after
