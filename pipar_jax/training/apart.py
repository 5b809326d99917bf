"""Whether stages compute each sample of a micro-batch by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipar_jax.training.compile import trial_draw, units_of
from pipar_jax.training.replica import Replica
from stages import Model
from stages.lengths import variants
from stages.trees import PyTree


def computes_apart(model: Model, replica: Replica, sizes: Iterable[int]) -> bool:
    """Returns whether a last sample that does not count leaves no trace in the others.

    The stage's programs are run twice, on random numbers that differ in this sample alone: outputs
    and cotangents of the others, the gradient and the metrics must have the same bits. They are the
    programs of training, so that nothing more is compiled. The replica stays as it is.

    Args:
      model: The whole model.
      replica: A replica whose loss counts samples, if it is the last stage's.
      sizes: Sizes of micro-batches.
    """
    return all(
        _is_apart(form, replica, samples)
        for form in variants(model)
        for samples in sizes
        if samples > 1
    )


def _is_apart(model: Model, replica: Replica, samples: int) -> bool:
    results = []
    for alike in (True, False):
        rng = np.random.default_rng(0)
        results.append(_results(model, replica, samples, rng, alike=alike))
        replica.clear()
    one, other = (jax.tree.leaves(result) for result in results)
    return len(one) == len(other) and all(
        np.isfinite(a).all() and np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


def _results(
    model: Model, replica: Replica, samples: int, rng: np.random.Generator, *, alike: bool
) -> list[PyTree]:
    """Returns what comes of a micro-batch, without its last sample, as float64.

    Args:
      model: The model for samples of one length.
      replica: The stage's replica, whose gradient is overwritten.
      samples: Samples in the micro-batch.
      rng: Draws them.
      alike: Whether the last sample is a copy of the first.
    """
    stage, (first, last) = replica.stage, units_of(replica)

    def draw(shape: Any) -> jax.Array:
        array = _random(shape, rng)
        if alike:
            array[-1] = array[0]
        put: jax.Array = jax.device_put(array)
        return put

    def others(array: jax.Array) -> Any:
        found = np.asarray(array, np.float64)
        return found[:-1] if found.shape[:1] == (samples,) else np.zeros(())

    shapes = model.shapes(samples)
    x = draw(shapes[model.unit_names.index(first)])
    sides = {name: draw(one) for name, one in stage.side_shapes(model, samples).items()}
    scalars = trial_draw(model, stage, samples)
    before = None if replica.single else replica.accumulated
    if stage.is_last:
        targets = jax.tree.map(draw, model.target_shapes(samples))
        metrics, cotangent, gradient, _ = stage.loss(
            replica.params, replica.state, x, targets, scalars, before, sides,
            fresh=True, counted=replica.count(samples - 1),
        )  # fmt: skip
        outputs = [metrics, None if cotangent is None else others(cotangent)]
    else:
        y, residuals, _ = stage.forward(replica.params, replica.state, x, scalars, sides)
        above = _random(shapes[model.unit_names.index(last) + 1], rng)
        above[-1] = 0
        outputs = [others(y)]
        cotangent, gradient = stage.backward(
            replica.params, residuals, jax.device_put(above), before, fresh=True
        )
        outputs.append(others(cotangent))
    replica.accumulated = None if replica.single else gradient
    # Copies: the next run gives the accumulated gradient away.
    copies: list[PyTree] = jax.tree.map(
        lambda leaf: np.array(leaf, np.float64), [outputs, gradient]
    )
    return copies


def _random(shape: Any, rng: np.random.Generator) -> Any:
    """Returns random numbers of an abstract shape; whole ones are 0 or 1, as tokens may be."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return rng.standard_normal(shape.shape).astype(shape.dtype)
    return rng.integers(0, 2, shape.shape).astype(shape.dtype)
