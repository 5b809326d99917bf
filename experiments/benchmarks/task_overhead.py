"""VGG-5 in two stages, whose last computes its loss by the task layer or by a line of optax.

Both ways share the first stage, the optimiser and the data, and compute what a run reports of a
step: the loss and how many outputs are right. So they differ in the task layer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stages
from stages.trees import Variables

NETWORK, CUT, SHAPE, CLASSES = "vgg5", 2, (32, 32, 3), 10
LEARNING_RATE, MOMENTUM = 0.01, 0.9
#: From weights, statistics, activation, labels and scalars of a micro-batch to loss, right outputs,
#: cotangent, gradient and statistics.
Last: TypeAlias = Callable[..., tuple[Any, Any, Any, Variables, Variables]]


class Training:
    """VGG-5 under training by one of the two ways.

    Attributes:
      params: The weights of both stages.
      loss: Mean loss of the last epoch.
      right: Share of outputs of the last epoch that were right.
    """

    def __init__(self, last: str, batch: int, steps: int) -> None:
        """Builds the network and its data, the same for both ways.

        Args:
          last: ``task`` or ``direct``.
          batch: Samples per step.
          steps: Steps in an epoch.
        """
        model = stages.build(NETWORK, input_shape=SHAPE, classes=CLASSES)
        self._first, part = stages.split(model, (CUT,))
        self._last = _by_task(part) if last == "task" else _directly(model)
        tx = optax.sgd(LEARNING_RATE, MOMENTUM)
        self._update, self._draw = stages.make_update(tx), stages.make_draw(batch)
        params, state = model.init(0)
        self.params = [stages.select(one, params) for one in (self._first, part)]
        self._state = [stages.select(one, state) for one in (self._first, part)]
        self._opt = [stages.init_opt_state(own, tx) for own in self.params]
        rng = np.random.default_rng(0)
        images = rng.standard_normal((steps, batch, *SHAPE)).astype(np.float32)
        labels = rng.integers(0, CLASSES, (steps, batch)).astype(np.int32)
        self._data = [jax.device_put(one) for one in zip(images, labels, strict=True)]
        self.loss = self.right = float("nan")

    def epoch(self) -> Any:
        """Takes all steps; returns the new weights."""
        losses, hits, samples = [], [], 0
        for images, labels in self._data:
            x, residuals, self._state[0] = self._first.forward(
                self.params[0], self._state[0], images, self._draw
            )
            loss, right, cotangent, gradient, self._state[1] = self._last(
                self.params[1], self._state[1], x, labels, self._draw
            )
            _, below = self._first.backward(self.params[0], residuals, cotangent, None)
            for i, own in enumerate((below, gradient)):
                self.params[i], self._opt[i] = self._update(self.params[i], self._opt[i], own)
            losses.append(loss)
            hits.append(right)
            samples += len(labels)
        self.loss = float(sum(losses)) / samples
        self.right = float(sum(hits)) / samples
        return self.params


def _by_task(part: stages.Stage) -> Last:
    """Returns the last stage as a run has it."""

    def last(params: Any, state: Any, x: Any, labels: Any, draw: Any) -> Any:
        metrics, cotangent, gradient, after = part.loss(params, state, x, labels, draw, None)
        return metrics["loss"], metrics["accuracy"][0], cotangent, gradient, after

    return last


def _directly(model: stages.Model) -> Last:
    """Returns the same stage written for this loss, compiled with the same options."""
    units = model.units[CUT:]

    def mean_loss(params: Any, x: Any, state: Any, labels: Any, draw: Any) -> Any:
        after = {}
        for unit in units:
            x, after[unit.name] = unit.call(
                params[unit.name], state[unit.name], x, {}, draw=draw, train=True
            )
        total = optax.softmax_cross_entropy_with_integer_labels(x, labels).sum()
        hits = (jnp.argmax(x, axis=-1) == labels).sum()
        return total * draw.inverse_batch, (total, hits, after)

    def last(params: Any, state: Any, x: Any, labels: Any, draw: Any) -> Any:
        (gradient, cotangent), (total, hits, after) = jax.grad(mean_loss, (0, 1), has_aux=True)(
            params, x, state, labels, draw
        )
        return total, hits, cotangent, gradient, after

    return stages.Program(last)
