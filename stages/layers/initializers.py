"""Initial values of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float, dtype: DTypeLike) -> jax.Array:
    """Draws weights from a normal distribution of mean zero.

    They are drawn on the host, by numpy's Philox from the next key of the stream: jax's own
    generator compiles once for every shape, which takes seconds for a deep network. Inside a
    trace (only shapes matter there) jax's generator is used.

    Args:
      rngs: Random streams; one key of ``params`` is used.
      shape: Shape of the weights.
      deviation: Standard deviation.
      dtype: Dtype of the weights.
    """
    key = rngs.params()
    if isinstance(key, jax.core.Tracer):
        return deviation * jax.random.normal(key, shape, dtype)
    words = np.asarray(jax.random.key_data(key), np.uint32).astype(np.uint64)
    bits = np.random.Philox(key=int(words[0]) << 32 | int(words[-1]))
    drawn = np.random.Generator(bits).standard_normal(shape, np.float32)
    return jnp.asarray(deviation * drawn, dtype)
