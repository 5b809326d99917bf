"""Networks as Flax writes them, computed by the formulations of this package.

A network of the user's own calls XLA's convolutions and pooling. In its traced equations those
that have a faster exact formulation on the current platform are found and computed by it:

* convolutions of NHWC images by square kernels, dense or depthwise (one kernel per channel), with
  any stride that is equal in both directions and any padding;
* maxima over square windows of images, with any padding;
* sums over windows that tile the images, without padding (averages are made from them).

Others stay XLA's: grouped, dilated, transposed and one-dimensional convolutions, kernels that are
not square, and everything inside loops and functions with custom derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from stages.equations import called, evaluate
from stages.layers.conv_functions import Geometry, convolve
from stages.layers.depthwise import depthwise
from stages.layers.formulation import has_choice
from stages.layers.pool import Edges, pool_maxima
from stages.trees import Equation, Jaxpr, PyTree

T = TypeVar("T")
_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)
_ONES = (1, 1)


def reformulated(function: Callable[..., T]) -> Callable[..., T]:
    """Returns a function that computes the same with the formulations of this package.

    Args:
      function: A function of pytrees of arrays that returns one. It is traced; where nothing in it
        has another formulation it is called as it is.
    """

    def run(*arguments: Any, **named: Any) -> T:
        if not has_choice():
            return function(*arguments, **named)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments, **named)
        if not _has_substitutes(closed.jaxpr):
            return function(*arguments, **named)
        leaves = jax.tree.leaves((arguments, named))
        made = evaluate(closed.jaxpr, closed.consts, leaves, substitute)
        result: T = jax.tree.unflatten(jax.tree.structure(shapes), made)
        return result

    return run


def substitute(equation: Equation) -> Callable[..., PyTree] | None:
    """Returns the formulation of an equation's operation, or None if it has none but XLA's."""
    make = _SUBSTITUTES.get(equation.primitive.name)
    if make is None or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return None
    return make(equation)


def _has_substitutes(jaxpr: Jaxpr) -> bool:
    """Returns whether there is a substitute for any equation, including those of calls."""
    for equation in jaxpr.eqns:
        inner = called(equation)
        if substitute(equation) is not None:
            return True
        if inner is not None and _has_substitutes(inner.jaxpr):
            return True
    return False


def _convolution(equation: Equation) -> Callable[..., PyTree] | None:
    params = equation.params
    x, kernel = (atom.aval for atom in equation.invars)
    if x.ndim != 4:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    stride, size = params["window_strides"][0], kernel.shape[0]
    plain = (
        tuple(numbers) == (_NHWC, _HWIO, _NHWC)
        and tuple(params["window_strides"]) == (stride, stride)
        and kernel.shape[:2] == (size, size)
        and x.dtype == kernel.dtype == equation.outvars[0].aval.dtype
        and params["lhs_dilation"] == params["rhs_dilation"] == _ONES
        and params["batch_group_count"] == 1
        and all(edge >= 0 for edges in params["padding"] for edge in edges)
        and 0 not in (*x.shape, *kernel.shape, *equation.outvars[0].aval.shape)
    )
    if not plain or groups not in (1, x.shape[-1]) or (groups > 1 and groups != kernel.shape[-1]):
        return None
    geometry, rest = split_padding(size, stride, params["padding"])
    function = convolve if groups == 1 else depthwise
    return partial(_padded, function, geometry, rest)


def split_padding(size: int, stride: int, edges: Edges) -> tuple[Geometry, Edges]:
    """Splits a convolution's padding into the part that a ``Geometry`` has, and the rest.

    Args:
      size: Height and width of the kernel.
      stride: Step in both directions.
      edges: Rows added before and after; columns added before and after.
    """
    padding = min(edge for axis in edges for edge in axis)
    more = min(high - padding for _, high in edges)
    rows, columns = ((low - padding, high - padding - more) for low, high in edges)
    return Geometry(size, stride, padding, more), (rows, columns)


def _padded(
    function: Callable[..., jax.Array],
    geometry: Geometry,
    rest: Edges,
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """Convolves an image to which the padding that the geometry does not have is added."""
    if any(map(any, rest)):
        x = jnp.pad(x, ((0, 0), *rest, (0, 0)))
    return function(x, kernel, geometry)


def _maxima(equation: Equation) -> Callable[..., PyTree] | None:
    window = _square_window(equation)
    if window is None:
        return None
    size, step, edges = window
    return lambda x: pool_maxima(x, size, step, edges)


def _sums(equation: Equation) -> Callable[..., PyTree] | None:
    window = _square_window(equation)
    if window is None or window[0] != window[1] or any(map(any, window[2])):
        return None
    size, shape = window[0], equation.outvars[0].aval.shape
    batch, rows, columns, channels = shape

    def total(x: jax.Array) -> jax.Array:
        kept = x[:, : rows * size, : columns * size]
        return kept.reshape(batch, rows, size, columns, size, channels).sum((2, 4))

    return total


def _square_window(equation: Equation) -> tuple[int, int, Edges] | None:
    """Returns size, step and padding of a window over the rows and columns of images."""
    params = equation.params
    dimensions, strides = params["window_dimensions"], params["window_strides"]
    if len(dimensions) != 4:
        return None
    first, *edges, last = params["padding"]
    size, step = dimensions[1], strides[1]
    plain = (
        tuple(dimensions) == (1, size, size, 1)
        and tuple(strides) == (1, step, step, 1)
        and first == last == (0, 0)
        and all(edge >= 0 for axis in edges for edge in axis)
        and {*params["base_dilation"], *params["window_dilation"]} == {1}
        and 0 not in (*equation.invars[0].aval.shape, *equation.outvars[0].aval.shape)
    )
    return (size, step, (edges[0], edges[1])) if plain else None


_SUBSTITUTES: dict[str, Callable[[Equation], Callable[..., PyTree] | None]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_max": _maxima,
    "reduce_window_sum": _sums,
}
