"""Loss and metrics of the whole model on a test set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import stages
from comms.arrays import Array
from pipar_jax.config import plugins
from pipar_jax.data import Dataset
from pipar_jax.data.types import computed
from pipar_jax.errors import RunError
from pipar_jax.runtime.metrics import Totals
from pipar_jax.training.compile import Told
from stages import Model, Stage
from stages.signature import unwrapped
from stages.tasks.per_sample import losses_of, sums_of
from stages.tasks.task import LOSS, Task
from stages.trees import Arrays, PyTree, Variables

#: Samples that are evaluated at a time.
BATCH = 250


class Score(NamedTuple):
    """The result of an evaluation.

    Attributes:
      loss: Mean loss over the test set.
      metrics: Metrics by name.
      tables: Metrics that are no single number, as nested lists.
    """

    loss: float
    metrics: Mapping[str, float]
    tables: Mapping[str, Any]

    @property
    def numbers(self) -> dict[str, float]:
        """Loss and metrics by name."""
        return {**self.metrics, LOSS: self.loss}


class Evaluator:
    """Evaluates variables of a model on the test split of a data set.

    Args:
      model: The model, whose task says what is computed.
      dataset: Where the test split and its normalisation come from.
      dtype: What samples are computed in.
    """

    def __init__(self, model: Model, dataset: Dataset, dtype: DTypeLike) -> None:
        self._dataset, self._dtype, self._task = dataset, np.dtype(dtype), model.task
        (stage,) = stages.split(model)
        self._sides = stage.sides
        self._batch = _scorer(stage, model.task)

    def evaluate(
        self, params: Variables, state: Variables, told: Told = lambda done, of: None
    ) -> Score:
        """Returns loss and metrics.

        Args:
          params: For each unit its weights.
          state: For each unit its batch statistics.
          told: Called with the number of evaluated samples and their total number.

        Raises:
          RunError: A metric of the user's own failed.
        """
        totals, outputs = self._run(params, state, told)
        metrics, tables = self._task.finish(totals.metrics), {}
        for name, value in self._of_all(outputs).items():
            if value.ndim:
                tables[name] = value.tolist()
            else:
                metrics[name] = float(value)
        return Score(totals.loss / totals.samples, metrics, tables)

    def sums(self, params: Variables, state: Variables) -> Totals:
        """Returns the sums over the test set, of losses and of the metrics that stream."""
        return self._run(params, state, lambda done, of: None)[0]

    def _run(self, params: Variables, state: Variables, told: Told) -> tuple[Totals, list[Array]]:
        """Returns the sums over the test set, and all outputs if metrics need them."""
        test = self._dataset.test
        batch = min(BATCH, len(test))
        totals, outputs = Totals(), []
        for first in range(0, len(test), batch):
            told(first, len(test))
            count = min(batch, len(test) - first)
            # The last batch is padded, so that only one shape is compiled.
            filled = first + np.arange(batch) % count
            some = self._dataset.at_full_length(test.take(filled))
            x = self._dataset.normalise(some.x)
            sides, targets = (
                {name: computed(one, self._dtype) for name, one in arrays.items()}
                for arrays in ({key: some.sides[key] for key in self._sides}, some.targets)
            )
            real = np.arange(batch) < count
            sums, made = self._batch(
                params, state, computed(x, self._dtype), sides, unwrapped(targets), real
            )
            pairs = {name: tuple(np.asarray(one).tolist()) for name, one in sums.items()}
            totals = totals.plus(Totals(float(pairs.pop(LOSS)[0]), count, pairs))
            if self._task.whole:
                outputs.append(np.asarray(made)[:count])
        return totals, outputs

    def _of_all(self, outputs: list[Array]) -> dict[str, Array]:
        """Returns the metrics that need all outputs."""
        made: dict[str, Array] = {}
        given = dataclasses.replace(self._dataset.test, inputs={})  # which may be a file's
        targets = unwrapped(self._dataset.at_full_length(given).targets)
        for metric in self._task.whole:
            what = f"task {self._task.name!r}: the metric {metric.name!r} failed"
            with plugins.guarded(what, RunError):
                value = np.asarray(metric.compute(np.concatenate(outputs), targets))
            is_table = metric.higher_is_better is None
            if value.dtype.kind not in "biuf" or (value.ndim > 0) != is_table:
                wanted = "a table of numbers" if is_table else "a number"
                raise RunError(
                    f"task {self._task.name!r}: the metric {metric.name!r} is "
                    f"{value.dtype}{list(value.shape)}, expected {wanted}"
                )
            made[metric.name] = value
        return made


@functools.lru_cache(maxsize=16)
def _scorer(stage: Stage, task: Task) -> Any:
    """Returns the compiled sums over a batch, and its outputs if they are needed."""

    def score(
        params: Variables,
        state: Variables,
        x: jax.Array,
        sides: Arrays,
        targets: PyTree,
        real: jax.Array,
    ) -> Any:
        outputs = stage.predict(params, state, x, sides)
        losses = jnp.sum(jnp.where(real, losses_of(task, outputs, targets), 0))
        sums = {LOSS: losses[None], **sums_of(task, outputs, targets, real)}
        return sums, outputs if task.whole else None

    return stages.Program(score)
