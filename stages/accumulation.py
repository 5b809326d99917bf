"""The gradient of a mini-batch, added up over its micro-batches."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stages.trees import Variables

#: Whether an accumulator holds nothing of the mini-batch yet: a scalar, so that the first
#: micro-batch needs no program of its own.
Fresh: TypeAlias = jax.Array | np.bool_


def add(accumulated: Variables | None, gradient: Variables, fresh: Fresh) -> Variables:
    """Adds a micro-batch's gradient; micro-batches are added in order of their index.

    Args:
      accumulated: The gradients added up so far, None where there is only one micro-batch.
      gradient: The micro-batch's.
      fresh: Whether what ``accumulated`` holds is of another mini-batch: it is replaced. Thus
        nobody has to fill it with zeros, a pass over memory as large as the weights.
    """
    if accumulated is None:
        return gradient
    total: Variables = jax.tree.map(
        lambda held, given: jnp.where(fresh, given, held + given), accumulated, gradient
    )
    return total
