"""Dropout whose mask belongs to the sample, not to the call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from stages import context
from stages.errors import StageError


class Dropout(nnx.Module):
    """Zeroes activations with probability ``rate`` in training and rescales the rest.

    The key of a sample's mask is the root seed folded with device, step, the unit's name, the
    layer's place in the unit and the sample's position in the mini-batch. So neither a cut
    nor the number of micro-batches changes a draw.
    """

    def __init__(self, rate: float) -> None:
        """Sets the probability of zeroing, 0 <= rate < 1.

        Raises:
          StageError: The rate is out of range.
        """
        if not 0.0 <= rate < 1.0:
            raise StageError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drops out elements of [batch, …]."""
        scope = context.current()
        if not scope.train or self.rate == 0.0:
            return x
        draw = scope.draw
        if draw is None:
            raise StageError(f"unit {scope.unit!r}: dropout needs the draw of the micro-batch")
        # A unit may hold several dropout layers; they differ in their place in the unit.
        key = jax.random.fold_in(scope.key(), jnp.uint32(scope.calls))
        scope.calls += 1
        positions = draw.position + jnp.arange(x.shape[0], dtype=jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
