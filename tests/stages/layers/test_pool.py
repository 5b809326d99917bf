"""Pooling: both formulations, ties included, and averages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.layers import average_pool, global_average_pool, max_pool
from stages.layers.formulation import Formulation, forced
from tests.stages.support import pulled

CASES = [
    ((3, 8, 8, 4), 2, None, 0),
    ((3, 7, 9, 4), 2, None, 0),
    ((2, 9, 9, 3), 3, None, 0),
    ((2, 8, 8, 3), 3, 2, 1),
    ((2, 7, 6, 3), 3, 2, 1),
    ((2, 6, 6, 3), 3, 1, 1),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("shape", "window", "stride", "padding"), CASES)
def test_formulations_agree_on_values_and_cotangents(shape, window, stride, padding, ties):
    random = np.random.default_rng(0)
    drawn = random.integers(-1, 2, shape) if ties else random.normal(size=shape)
    x = jnp.asarray(drawn, jnp.float32)
    results = []

    def pool(x):
        return max_pool(x, window, stride=stride, padding=padding)

    for formulation in (Formulation.XLA, Formulation.DIRECT):
        with forced(formulation):
            size = jax.eval_shape(pool, x).shape
            cotangent = jnp.asarray(np.random.default_rng(1).integers(1, 9, size), jnp.float32)
            y, (gradient,) = pulled(pool, cotangent, x)
            results.append((y, gradient))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_first_of_equal_elements_gets_the_whole_cotangent():
    for formulation in (Formulation.XLA, Formulation.DIRECT):
        with forced(formulation):
            gradient = jax.grad(lambda x: max_pool(x, 2).sum())(jnp.zeros((1, 2, 2, 1)))
        np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


def test_averages():
    x = jnp.arange(2 * 5 * 4 * 3, dtype=jnp.float32).reshape(2, 5, 4, 3)
    np.testing.assert_allclose(global_average_pool(x), np.asarray(x).mean((1, 2)), rtol=1e-6)
    pooled = average_pool(x, 2)
    assert pooled.shape == (2, 2, 2, 3)
    np.testing.assert_allclose(pooled[:, 1, 0], np.asarray(x)[:, 2:4, 0:2].mean((1, 2)), rtol=1e-6)
