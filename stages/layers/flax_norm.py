"""Flax's own batch normalisation, in training, with the backward pass written out.

Statistics are computed as Flax does with ``use_fast_variance=False``: in two passes, which is the
more exact way. Layers in 16 bits, with a mask, over other axes than all but the last, or across
accelerators stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from stages.layers.norm_functions import batch_normalise

_WIDE = frozenset(map(jnp.dtype, ("float32", "float64")))


class WrittenOutBatchNorm(nnx.BatchNorm):
    """Flax's layer with our formulation; see ``write_out``."""

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Any:
        """Normalises the last axis, see ``nnx.BatchNorm``."""
        given = use_running_average
        chosen = self.use_running_average if given is None else given
        variables = (self.mean, self.var, self.scale, self.bias)
        arrays: list[Any] = [
            None if variable is None else variable.get_value() for variable in variables
        ]
        own_promotion = self.promote_dtype is not promote_dtype
        if chosen or mask is not None or own_promotion or not _fits(self, x, arrays):
            return super().__call__(x, use_running_average, mask=mask)
        mean, var, scale, bias = arrays
        y, mean, var = _normalise(x, mean, var, scale, bias, self.momentum, self.epsilon)
        # Assigning through an index would search the whole trace for each array's sharding.
        self.mean.set_value(mean)
        self.var.set_value(var)
        return y


def write_out(layer: nnx.BatchNorm) -> None:
    """Lets a layer of a merged module, which is called once, compute with our formulation."""
    if type(layer) is nnx.BatchNorm:
        layer.__class__ = WrittenOutBatchNorm


def linen_batch_norm(
    module: linen.BatchNorm,
    momentum: Any,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array | None:
    """Computes what a bound layer of Linen would, or returns None where only Flax can.

    Args:
      module: The layer, in ``apply``; its running averages are updated.
      momentum: Decay of the running averages, instead of the layer's own.
      x: [batch, …, features].
      use_running_average: As for the layer.
      mask: As for the layer.
    """
    given = use_running_average
    chosen = module.use_running_average if given is None else given
    kept: list[Any] = [module.get_variable("batch_stats", name) for name in ("mean", "var")]
    arrays = [*kept, *(module.get_variable("params", name) for name in ("scale", "bias"))]
    if type(module) is not linen.BatchNorm or chosen is not False or mask is not None:
        return None
    if not module.is_mutable_collection("batch_stats") or not _fits(module, x, arrays):
        return None
    mean, var, scale, bias = arrays
    y, mean, var = _normalise(x, mean, var, scale, bias, momentum, module.epsilon)
    module.put_variable("batch_stats", "mean", mean)
    module.put_variable("batch_stats", "var", var)
    return y


def _fits(layer: Any, x: Any, arrays: list[jax.Array | None]) -> bool:
    """Returns whether a layer normalises the last axis, all in one wide dtype."""
    mean, var, scale, bias = arrays
    dtype = getattr(x, "dtype", None)
    return (
        dtype in _WIDE
        and x.ndim > 1
        and layer.axis in (-1, x.ndim - 1)
        and layer.axis_name is None
        and (layer.dtype is None or jnp.dtype(layer.dtype) == dtype)
        and mean is not None
        and var is not None
        and (scale is not None) == layer.use_scale
        and (bias is not None) == layer.use_bias
        and all(array is None or array.dtype == dtype for array in arrays)
    )


def _normalise(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    momentum: Any,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the output and the new running averages."""
    dtype: DTypeLike = x.dtype
    gain = jnp.ones(x.shape[-1:], dtype) if scale is None else scale
    shift = jnp.zeros(x.shape[-1:], dtype) if bias is None else bias
    y, batch_mean, batch_var = batch_normalise(x, gain, shift, epsilon)
    batch_mean, batch_var = lax.stop_gradient((batch_mean, batch_var))
    mean = momentum * mean + (1 - momentum) * batch_mean
    return y, mean, momentum * var + (1 - momentum) * batch_var
