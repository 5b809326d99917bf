"""Depthwise convolution by shifted sums equals XLA's grouped convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stages.layers import Conv
from stages.layers.conv_functions import Geometry, xla_convolve
from stages.layers.depthwise import depthwise
from stages.layers.formulation import Formulation, forced
from tests.stages.support import pulled


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((3, 8, 8, 4), Geometry(3, 1, 1)),
        ((3, 9, 7, 4), Geometry(3, 2, 1)),
        ((2, 6, 6, 3), Geometry(5, 2, 2)),
        ((2, 1, 1, 3), Geometry(5, 1, 2)),
    ],
)
def test_values_and_gradients_equal_those_of_xla(shape, geometry):
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=shape))
        kernel = jnp.asarray(random.normal(size=(geometry.size, geometry.size, 1, shape[3])))
        size = (shape[0], geometry.out(shape[1]), geometry.out(shape[2]), shape[3])
        cotangent = jnp.asarray(random.normal(size=size))
        expected, wanted = pulled(
            lambda x, k: xla_convolve(x, k, geometry, groups=shape[3]), cotangent, x, kernel
        )
        with forced(Formulation.DIRECT):
            actual, gradients = pulled(lambda x, k: depthwise(x, k, geometry), cotangent, x, kernel)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_convolution_of_as_many_groups_as_channels_is_depthwise():
    layer = Conv(6, 6, 3, groups=6, use_bias=True, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 6)), jnp.float32)
    layer.bias[...] = jnp.arange(6.0)
    expected = xla_convolve(x, layer.kernel[...], Geometry(3, 1, 1), groups=6) + jnp.arange(6.0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_grouped_convolutions_of_wider_groups_are_xla_s():
    layer = Conv(6, 4, 3, groups=2, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (3, 3, 3, 4)
    assert layer(jnp.ones((2, 5, 5, 6))).shape == (2, 5, 5, 4)
