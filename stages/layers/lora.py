"""Low-rank adapters on dense layers (LoRA; Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stages.layers.dense import Dense
from stages.layers.dtypes import weight_dtype
from stages.layers.initializers import normal

#: Pattern of the names (unit/path) of adapters' weights.
ADAPTERS = "/lora/"


class LoraSettings(NamedTuple):
    """Which dense layers have adapters, and of what size.

    Attributes:
      match: Regular expression that is searched in the layers' names, "unit/path".
      rank: Inner size of the adapters.
      alpha: Their output is multiplied by alpha / rank.
    """

    match: str
    rank: int
    alpha: float


class Adapter(nnx.Module):
    """The product of two thin matrices, added to a dense layer's output (equation 3).

    The second matrix is zero at first, so that the layer begins as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the first matrix with variance 1 / in_features."""
        held = weight_dtype(dtype)
        self.a = nnx.LoRAParam(normal(rngs, (in_features, rank), in_features**-0.5, held))
        self.b = nnx.LoRAParam(jnp.zeros((rank, out_features), held))
        self.scale, self.dtype = alpha / rank, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, …, in] to [batch, …, out]."""
        inner = jnp.matmul(x.astype(self.dtype), self.a[...].astype(self.dtype))
        y: jax.Array = self.scale * jnp.matmul(inner, self.b[...].astype(self.dtype))
        return y


def adapted(
    unit: str, factory: Callable[[nnx.Rngs], Any], settings: LoraSettings
) -> Callable[[nnx.Rngs], Any]:
    """Returns a unit's factory whose matching dense layers have adapters.

    The layers' own weights are drawn as without adapters.

    Args:
      unit: The unit's name.
      factory: Makes the unit's module.
      settings: Which layers, and the adapters' size.
    """

    def build(rngs: nnx.Rngs) -> Any:
        module = factory(rngs)
        for path, layer in list(nnx.iter_graph(module)):
            name = "/".join((unit, *map(str, path)))
            if isinstance(layer, Dense) and re.search(settings.match, name):
                inner, outer = layer.kernel.shape
                adapter = Adapter(
                    inner, outer, settings.rank, settings.alpha, dtype=layer.dtype, rngs=rngs
                )
                layer.lora = nnx.data(adapter)
        return module

    return build
