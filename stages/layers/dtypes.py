"""Which dtype weights have and which one a layer computes in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


def weight_dtype(dtype: DTypeLike) -> Any:
    """Weights of 16-bit layers stay float32; otherwise they have the layer's own dtype."""
    return jnp.promote_types(dtype, jnp.float32)
