"""What is found in traced functions equals XLA's own operations in every formulation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stages.layers.formulation import Formulation, forced
from stages.layers.reformulation import reformulated, split_padding, substitute
from tests.stages.support import pulled

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(kernel, **options):
    """A convolution by a kernel of a shape."""
    given = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, **options}
    weights = jnp.asarray(np.random.default_rng(1).normal(size=kernel), jnp.float32)

    def run(x):
        return lax.conv_general_dilated(x, weights.astype(x.dtype), **given)

    return run


def window(init, operation, dimensions, strides, padding):
    """A reduction over windows."""
    return lambda x: lax.reduce_window(x, init, operation, dimensions, strides, padding)


maxima = partial(window, -jnp.inf, lax.max)
sums = partial(window, 0.0, lax.add)
NONE = ((0, 0),) * 4

#: Functions of [2, 8, 7, 4] that have another formulation.
FOUND = {
    "same": conv((3, 3, 4, 5)),
    "valid": conv((3, 3, 4, 5), padding="VALID"),
    "stride, uneven": conv((3, 3, 4, 5), window_strides=(2, 2)),
    "7x7, uneven": conv((7, 7, 4, 2), window_strides=(2, 2)),
    "even size": conv((2, 2, 4, 3)),
    "another padding on each edge": conv((3, 3, 4, 2), padding=((0, 2), (3, 1))),
    "more before than after": conv((3, 3, 4, 2), padding=((2, 0), (2, 0))),
    "pointwise": conv((1, 1, 4, 3), window_strides=(2, 2)),
    "depthwise": conv((3, 3, 1, 4), feature_group_count=4),
    "depthwise, stride, uneven": conv((3, 3, 1, 4), feature_group_count=4, window_strides=(2, 2)),
    "in a call": jax.jit(jax.jit(conv((3, 3, 4, 5)))),
    "maxima": maxima((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "maxima, overlapping": maxima((1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    "maxima, uneven": maxima((1, 2, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 0), (0, 1), (0, 0))),
    "sums": sums((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
}  # fmt: skip
#: Functions that have none.
LEFT = {
    "not square": conv((1, 3, 4, 5)),
    "two strides": conv((3, 3, 4, 5), window_strides=(1, 2)),
    "dilated kernel": conv((3, 3, 4, 5), rhs_dilation=(2, 2)),
    "transposed": conv((3, 3, 4, 5), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
    "groups": conv((3, 3, 2, 6), feature_group_count=2),
    "several kernels for a channel": conv((3, 3, 1, 8), feature_group_count=4),
    "cropped": conv((3, 3, 4, 5), padding=((-1, 0), (0, 0))),
    "layout": conv((3, 3, 8, 5), dimension_numbers=("NCHW", "HWIO", "NCHW")),
    "in a loop": lambda x: lax.scan(lambda c, _: (conv((3, 3, 4, 4))(c), None), x, length=2)[0],
    "maxima of a row": maxima((1, 1, 2, 1), (1, 1, 2, 1), "VALID"),
    "maxima over channels": maxima((1, 2, 2, 2), (1, 2, 2, 2), "VALID"),
    "dilated maxima": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), NONE, window_dilation=(1, 2, 2, 1)),
    "overlapping sums": sums((1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    "sums of padded": sums((1, 2, 2, 1), (1, 2, 2, 1), "SAME"),
}  # fmt: skip


def images(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 7, 4)), dtype)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_has_equal_values_and_gradients(name):
    function = FOUND[name]
    with jax.enable_x64(True):
        x = images(jnp.float64)
        cotangent = jnp.cos(jnp.arange(function(x).size, dtype=x.dtype)).reshape(function(x).shape)
        expected = pulled(function, cotangent, x)
        for formulation in (Formulation.PATCHES, Formulation.DIRECT):
            with forced(formulation):
                actual = pulled(reformulated(function), cotangent, x)
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*FOUND, *LEFT])
def test_which_operations_have_another_formulation(name):
    function = {**FOUND, **LEFT}[name]
    text = str(jax.make_jaxpr(function)(images()))
    with forced(Formulation.DIRECT):
        other = str(jax.make_jaxpr(reformulated(function))(images()))
    assert (other != text) == (name in FOUND)


def test_integers_and_accelerators_keep_their_operations():
    whole = window(jnp.iinfo(jnp.int32).min, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), NONE)
    (equation,) = jax.make_jaxpr(whole)(images(jnp.int32)).jaxpr.eqns
    assert substitute(equation) is None
    function = FOUND["same"]
    with forced(Formulation.XLA):  # what every other platform chooses
        assert str(jax.make_jaxpr(reformulated(function))(images())) == str(
            jax.make_jaxpr(function)(images())
        )


def test_several_results_and_named_arguments_keep_their_structure():
    def function(x, *, scale):
        return {"y": FOUND["same"](x) * scale["by"], "x": x}, None

    given = images(), {"by": jnp.float32(2.0)}
    with forced(Formulation.PATCHES):
        actual = reformulated(function)(given[0], scale=given[1])
    expected = function(given[0], scale=given[1])
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize(
    ("edges", "geometry", "rest"),
    [
        (((1, 1), (1, 1)), (3, 2, 1, 0), ((0, 0), (0, 0))),
        (((0, 1), (0, 1)), (3, 2, 0, 1), ((0, 0), (0, 0))),
        (((0, 1), (1, 1)), (3, 2, 0, 1), ((0, 0), (1, 0))),
        (((2, 0), (2, 0)), (3, 2, 0, 0), ((2, 0), (2, 0))),
        (((2, 5), (1, 2)), (3, 2, 1, 1), ((1, 3), (0, 0))),
    ],
)
def test_any_padding_is_split_into_an_even_part_and_a_rest(edges, geometry, rest):
    assert split_padding(3, 2, edges) == (geometry, rest)
