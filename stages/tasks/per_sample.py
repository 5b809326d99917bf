"""Losses and metrics of samples, checked: what a task returns is reduced here and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.errors import StageError
from stages.foreign import describe
from stages.tasks.task import LOSS, Metric, Task
from stages.trees import PyTree, Targets

#: Samples in the shapes by which a task is checked; raised to a size that nothing else has.
_SAMPLES = 3


def losses_of(task: Task, outputs: jax.Array, targets: Targets) -> jax.Array:
    """Returns the loss of each sample, [samples].

    Raises:
      StageError: The task returned something else.
    """
    losses = task.loss(outputs, targets)
    return _checked(losses, f"task {task.name!r}: the loss", len(outputs), "losses")


def total_loss(
    task: Task, outputs: jax.Array, targets: Targets, real: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the sum of the samples' losses, and it with the sums of the metrics by name.

    Metrics have no gradient.

    Args:
      task: The task.
      outputs: [samples, …].
      targets: [samples, …].
      real: [samples] bool, which of them count; None for all.
    """
    losses = losses_of(task, outputs, targets)
    total = jnp.sum(losses if real is None else jnp.where(real, losses, 0))
    return total, {LOSS: total, **sums_of(task, jax.lax.stop_gradient(outputs), targets, real)}


def values_of(
    task: Task, metric: Metric, outputs: jax.Array, targets: Targets
) -> tuple[jax.Array, jax.Array | None]:
    """Returns a metric's values [samples], and their weights [samples] or None for 1.

    Raises:
      StageError: The metric returned something else.
    """
    what, count = f"task {task.name!r}: the metric {metric.name!r}", len(outputs)
    made = metric.values(outputs, targets)
    values, weights = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    values = _checked(values, what, count, "values")
    if weights is not None:
        weights = _checked(weights, f"{what}, its weights", count, "weights")
    return values, weights


def sums_of(
    task: Task, outputs: jax.Array, targets: Targets, real: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Returns for each metric [2]: the sums of its numerators and of its denominators.

    Args:
      task: The task.
      outputs: [samples, …].
      targets: [samples, …].
      real: [samples] bool, which of them count; None for all.
    """
    sums = {}
    for metric in task.metrics:
        values, weights = values_of(task, metric, outputs, targets)
        if real is not None:
            values = jnp.where(real, values, 0)
            weights = real if weights is None else jnp.where(real, weights, 0)
        weight = len(values) if weights is None else jnp.sum(weights)
        sums[metric.name] = jnp.stack([jnp.sum(values), jnp.asarray(weight, values.dtype)])
    return sums


def _checked(values: Any, what: str, samples: int, kind: str) -> jax.Array:
    """Returns values if they are [samples] of a floating dtype."""
    shape = getattr(values, "shape", None)
    dtype = getattr(values, "dtype", None)
    if shape is None or dtype is None:
        raise StageError(f"{what} is {type(values).__name__}, expected an array of {kind}")
    if tuple(shape) != (samples,):
        got = "a scalar" if shape == () else f"shape {tuple(shape)}"
        raise StageError(
            f"{what} is {got}, expected [samples] = ({samples},): return one of the {kind} for "
            "each sample, and reduce over all other axes; the mean over samples is taken by the "
            "engine"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise StageError(f"{what} is {dtype}, expected floating numbers")
    # Sums of a micro-batch would have the few digits, and the range, of 16 bits.
    return jnp.asarray(values, jnp.promote_types(dtype, jnp.float32))


def check_task(task: Task, outputs: Any, targets: PyTree) -> None:
    """Checks a task against outputs and targets by their shapes, without computing.

    Args:
      task: The task.
      outputs: Abstract outputs [samples, …] of the model.
      targets: Abstract targets [samples, …].

    Raises:
      StageError: Targets do not fit, a loss or metric does not return one number for each sample,
        or the user's function fails.
    """
    like = task.targets.like(outputs.shape[1:])
    if like is not None and (isinstance(targets, dict) or _kind(targets) != like):
        shape = f"of shape {like[0]}" if like[0] else "without axes"
        numbers = "whole numbers" if like[1] == "i" else "floating numbers"
        raise StageError(
            f"task {task.name!r}: the targets are {_shapes(targets)}, expected {numbers} {shape} "
            f"for each sample, for outputs {list(outputs.shape)}: check the targets, the last unit "
            "of the model, and task.name"
        )
    taken = {size for leaf in (outputs, *jax.tree.leaves(targets)) for size in leaf.shape[1:]}
    count = next(number for number in range(_SAMPLES, 10_000) if number not in taken)

    def batched(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)  # type: ignore

    whole = batched(outputs), jax.tree.map(batched, targets)
    checks: list[tuple[str, Any]] = [(f"the {LOSS}", partial(losses_of, task))]
    for metric in task.metrics:
        checks.append((f"the metric {metric.name!r}", partial(values_of, task, metric)))
    for what, function in checks:
        try:
            jax.eval_shape(function, *whole)
        except StageError:
            raise
        except Exception as error:
            raise StageError(
                f"task {task.name!r}: {what} failed for outputs {list(whole[0].shape)} and targets "
                f"{_shapes(whole[1])}: {describe(error)}"
            ) from error


def check_alone(task: Task, outputs: Any, targets: PyTree) -> None:
    """Checks, by computing, that losses and metrics of a sample depend on that sample alone.

    Otherwise they would depend on how samples are divided among micro-batches, and shapes do not
    show it, such as where a mean over samples is subtracted, or [samples, 1] meets [samples].

    Args:
      task: The task.
      outputs: Abstract outputs [samples, …] of the model.
      targets: Targets [2, …] of two samples.

    Raises:
      StageError: They depend on both samples.
    """
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    drawn = np.random.default_rng(0).normal(size=(2, *outputs.shape[1:]))
    both = jnp.asarray(drawn, dtype), jax.tree.map(jnp.asarray, targets)
    functions: list[tuple[str, Any]] = [(f"the {LOSS}", partial(losses_of, task))]
    functions += [
        (f"the metric {metric.name!r}", partial(values_of, task, metric)) for metric in task.metrics
    ]
    for what, function in functions:
        whole = jax.tree.leaves(function(*both))
        parts = [
            jax.tree.leaves(function(*jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], both)))
            for at in range(2)
        ]
        for together, *alone in zip(whole, *parts, strict=True):
            if not np.allclose(together, jnp.concatenate(alone), 1e-3, 1e-6, equal_nan=True):
                raise StageError(
                    f"task {task.name!r}: {what} of a sample depends on the samples beside it "
                    f"({np.asarray(together).tolist()} for two, "
                    f"{np.concatenate(alone).tolist()} for each alone): reduce over all axes but "
                    "the first, and compare shapes of outputs and targets"
                )


def _kind(targets: Any) -> tuple[tuple[int, ...], str]:
    """Returns the shape of one sample's targets, and the kind of their dtype."""
    floating = jnp.issubdtype(targets.dtype, jnp.floating)
    return tuple(targets.shape[1:]), "f" if floating else "i"


def _shapes(targets: PyTree) -> str:
    """Returns shapes and dtypes of abstract targets as text."""
    if isinstance(targets, dict):
        return ", ".join(
            f"{name} {target.dtype}{list(target.shape)}" for name, target in targets.items()
        )
    return f"{targets.dtype}{list(targets.shape)}"
