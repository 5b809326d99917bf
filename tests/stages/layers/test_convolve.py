"""Every formulation of a convolution gives the same values and gradients."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.layers import convolve as module
from stages.layers.choice import Formulation, forced
from stages.layers.convolve import Geometry, convolve, xla_convolve
from tests.stages.support import pulled

GEOMETRIES = [
    ((5, 6, 7, 3), 4, Geometry(3, 1, 1)),
    ((5, 8, 8, 4), 6, Geometry(3, 2, 1)),
    ((4, 9, 7, 4), 6, Geometry(3, 2, 1)),
    ((3, 11, 10, 3), 5, Geometry(7, 2, 3)),
    ((3, 5, 5, 8), 4, Geometry(1, 1, 0)),
    ((3, 6, 5, 8), 4, Geometry(1, 2, 0)),
    ((3, 2, 2, 8), 8, Geometry(3, 1, 1)),
    ((3, 1, 1, 8), 8, Geometry(5, 1, 2)),
]


@pytest.mark.parametrize(("shape", "out", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("formulation", [Formulation.XLA, Formulation.PATCHES])
def test_values_and_gradients_equal_those_of_xla(shape, out, geometry, formulation, monkeypatch):
    # Small enough that batches are cut into several runs.
    monkeypatch.setattr(module, "PATCH_BYTES", 2000)
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=shape))
        kernel = jnp.asarray(random.normal(size=(geometry.size, geometry.size, shape[3], out)))
        size = (shape[0], geometry.out(shape[1]), geometry.out(shape[2]), out)
        cotangent = jnp.asarray(random.normal(size=size))
        expected, wanted = pulled(lambda x, k: xla_convolve(x, k, geometry), cotangent, x, kernel)
        with forced(formulation):
            actual, gradients = pulled(lambda x, k: convolve(x, k, geometry), cotangent, x, kernel)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_output_length_is_that_of_the_sliding_window():
    assert Geometry(3, 2, 1).out(32) == 16
    assert Geometry(7, 2, 3).out(28) == 14
    assert Geometry(1, 2, 0).out(7) == 4


def test_runs_of_samples_cover_the_batch_once():
    runs = module._chunks(100, module.PATCH_BYTES // 7)
    assert runs[0][0] == 0 and runs[-1][1] == 100
    assert all(a[1] == b[0] for a, b in pairwise(runs))
    assert max(b - a for a, b in runs) <= 7
    assert module._chunks(3, 10 * module.PATCH_BYTES) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("value", [0.0, np.inf, -np.inf, np.nan])
def test_what_is_written_out_is_unchanged_and_nothing_is_fused_across(value):
    x = jnp.full((2, 3, 3, 4), 2.0).at[0, 0].set(value)
    function = jax.jit(lambda x: module._written_out(x * 3.0) + 1.0)
    np.testing.assert_array_equal(function(x), x * 3.0 + 1.0)
    assert "conditional(" in function.lower(x).compile().as_text()
