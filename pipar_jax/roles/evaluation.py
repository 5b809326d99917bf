"""Loss and accuracy of the whole model on a test set, at the coordinator."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import stages
from pipar_jax.data import Dataset
from pipar_jax.data.types import computed
from stages import Model, Stage
from stages.signature import unwrapped
from stages.trees import Arrays, PyTree, Variables

#: Samples that are evaluated at a time.
BATCH = 250


class Score(NamedTuple):
    """The result of an evaluation.

    Attributes:
      loss: Mean loss over the test set.
      accuracy: Share of samples whose largest logit is the label's.
    """

    loss: float
    accuracy: float


class Evaluator:
    """Evaluates variables of a model on the test split of a data set.

    Args:
      model: The model.
      dataset: Where the test split and its normalisation come from.
      dtype: What samples are computed in.
    """

    def __init__(self, model: Model, dataset: Dataset, dtype: DTypeLike) -> None:
        self._dataset, self._dtype = dataset, np.dtype(dtype)
        (stage,) = stages.split(model)
        self._sides = stage.sides
        self._score = _scorer(stage)

    def evaluate(self, params: Variables, state: Variables) -> Score:
        """Returns loss and accuracy.

        Args:
          params: For each unit its weights.
          state: For each unit its batch statistics.
        """
        test = self._dataset.test
        batch = min(BATCH, len(test))
        loss = correct = 0.0
        for first in range(0, len(test), batch):
            some = slice(first, first + batch)
            count = len(test.x[some])
            # The last batch is padded, so that only one shape is compiled.
            filled = np.arange(batch) % count
            x = self._dataset.normalise(np.asarray(test.x[some]))
            sides, targets = (
                {name: computed(one[some][filled], self._dtype) for name, one in arrays.items()}
                for arrays in ({key: test.sides[key] for key in self._sides}, test.targets)
            )
            real = np.arange(batch) < count
            sums = self._score(
                params, state, computed(x[filled], self._dtype), sides, unwrapped(targets), real
            )
            loss += float(sums[0])
            correct += float(sums[1])
        return Score(loss / len(test), correct / len(test))


@functools.lru_cache(maxsize=16)
def _scorer(stage: Stage) -> Any:
    """Returns the compiled sums of losses and hits of a batch, once per model and process."""

    def score(
        params: Variables,
        state: Variables,
        x: jax.Array,
        sides: Arrays,
        labels: PyTree,
        real: jax.Array,
    ) -> Any:
        logits = stage.predict(params, state, x, sides)
        losses, hits = stages.sample_losses(logits, labels)
        return jnp.sum(jnp.where(real, losses, 0)), jnp.sum(jnp.where(real, hits, 0))

    return stages.Program(score)
