"""Every formulation of a convolution gives the same values and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.layers import conv_functions as module
from stages.layers.conv_functions import Geometry, convolve, xla_convolve
from stages.layers.formulation import Formulation, forced
from tests.stages.support import pulled

PATCHES = module.PATCH_BYTES
GEOMETRIES = [
    ((5, 6, 7, 3), 4, Geometry(3, 1, 1)),
    ((5, 8, 8, 4), 6, Geometry(3, 2, 1)),
    ((4, 9, 7, 4), 6, Geometry(3, 2, 1)),
    ((3, 11, 10, 3), 5, Geometry(7, 2, 3)),
    ((3, 5, 5, 8), 4, Geometry(1, 1, 0)),
    ((3, 6, 5, 8), 4, Geometry(1, 2, 0)),
    ((3, 2, 2, 8), 8, Geometry(3, 1, 1)),
    ((3, 1, 1, 8), 8, Geometry(5, 1, 2)),
    ((5, 8, 6, 4), 6, Geometry(3, 2, 0, 1)),
    ((3, 12, 10, 3), 5, Geometry(7, 2, 2, 1)),
    ((3, 2, 2, 8), 8, Geometry(3, 2, 0, 1)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("shape", "out", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("formulation", [Formulation.XLA, Formulation.PATCHES])
@pytest.mark.parametrize("patch_bytes", [2000, 30_000])  # runs of a sample; and runs with a rest
def test_values_and_gradients_equal_those_of_xla(
    shape, out, geometry, formulation, patch_bytes, monkeypatch
):
    monkeypatch.setattr(module, "PATCH_BYTES", patch_bytes)
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


@pytest.mark.parametrize(
    ("height", "width", "geometry"),
    [
        (2, 2, Geometry(3, 2, 1)),
        (7, 6, Geometry(3, 3, 1)),
        (3, 8, Geometry(5, 2, 2)),
        (7, 5, Geometry(2, 3, 0)),  # some pixels meet no pixel of the kernel
        (4, 4, Geometry(1, 2, 1)),
        (5, 5, Geometry(4, 1, 2)),  # a kernel of even size makes the map larger
        (6, 5, Geometry(3, 1, 0)),
        (9, 9, Geometry(7, 3, 3)),
        (8, 6, Geometry(3, 2, 0, 1)),
        (4, 5, Geometry(2, 1, 0, 1)),
        (5, 4, Geometry(1, 2, 0, 2)),
    ],
)
def test_the_cotangent_of_an_input_is_exact_for_all_strides_and_paddings(height, width, geometry):
    random = np.random.default_rng(0)
    # Small whole numbers: their sums are exact.
    draw = lambda *shape: jnp.asarray(random.integers(-4, 5, shape), jnp.float32)  # noqa: E731
    kernel, shape = draw(geometry.size, geometry.size, 3, 2), (5, height, width, 3)
    cotangent = draw(5, geometry.out(height), geometry.out(width), 2)

    def both(kernel, cotangent):
        _, pull = jax.vjp(lambda x: xla_convolve(x, kernel, geometry), jnp.zeros(shape))
        return pull(cotangent)[0], module.patches_input(shape, kernel, geometry, cotangent)

    expected, actual = jax.jit(both)(kernel, cotangent)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("length", "geometry", "expected"),
    [
        (8, Geometry(3, 1, 1), [0, 1, 2]),
        (2, Geometry(3, 2, 1), [1, 2]),
        (1, Geometry(3, 2, 1), [1]),
        (2, Geometry(7, 1, 3), [2, 3, 4]),
        (3, Geometry(1, 2, 0), [0]),
    ],
)
def test_rows_of_the_kernel_that_meet_padding_alone_are_left_out(length, geometry, expected):
    assert list(geometry.reached(length)) == expected
    side = geometry.out(length)
    shapes = (2, length, length, 16), (geometry.size, geometry.size, 16, 16), (2, side, side, 16)

    def run(x, kernel, cotangent):
        with forced(Formulation.PATCHES):
            y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, geometry), x, kernel)
            return y, pull(cotangent)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    flops = jax.jit(run).lower(*arrays).compile().cost_analysis()["flops"]
    needed = 3 * 2 * 2 * side**2 * len(expected) ** 2 * 16 * 16
    assert flops < 1.5 * needed + 2000


def test_output_length_is_that_of_the_sliding_window():
    assert Geometry(3, 2, 1).out(32) == 16
    assert Geometry(7, 2, 3).out(28) == 14
    assert Geometry(1, 2, 0).out(7) == 4


@pytest.mark.parametrize(
    ("batch", "bytes_per_sample", "result_bytes", "together"),
    [
        (100, PATCHES // 7, 0, 5),  # 7 fit, 5 divide the batch
        (101, PATCHES // 7, 0, 7),  # nothing near 7 does
        (3, 10 * PATCHES, 0, 1),  # not even one fits
        (25, PATCHES // 100, 0, 25),  # all of them do
        (25, PATCHES, 30 * PATCHES, 25),  # a large result is not added to 25 times
    ],
)
def test_runs_fit_the_cache(batch, bytes_per_sample, result_bytes, together):
    assert module.samples_together(batch, bytes_per_sample, result_bytes) == together


def test_a_batch_is_cut_into_runs_and_a_rest():
    runs, rest = module.cut_batch(jnp.arange(14).reshape(7, 2), 3)
    np.testing.assert_array_equal(runs.reshape(6, 2), np.arange(12).reshape(6, 2))
    np.testing.assert_array_equal(rest, [[12, 13]])
    assert runs.shape == (2, 3, 2)


def test_patches_of_a_batch_take_no_more_memory_than_those_of_a_run():
    geometry, shape = Geometry(3, 1, 1), (100, 16, 16, 32)

    def temporary(batch):
        arrays = (jax.ShapeDtypeStruct((batch, *shape[1:]), jnp.float32),) * 2
        gradient = partial(module.patches_kernel, shape=(3, 3, 32, 32), geometry=geometry)
        function = jax.jit(lambda x, cotangent: gradient(x, cotangent=cotangent))
        return function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    patches = 16 * 16 * 9 * 32 * 4
    assert temporary(100) < temporary(10) + 20 * patches


@pytest.mark.parametrize("value", [0.0, np.inf, -np.inf, np.nan])
def test_what_is_written_out_is_unchanged_and_nothing_is_fused_across(value):
    x = jnp.full((2, 3, 3, 4), 2.0).at[0, 0].set(value)
    function = jax.jit(lambda x: module.written_out(x * 3.0) + 1.0)
    np.testing.assert_array_equal(function(x), x * 3.0 + 1.0)
    assert "conditional(" in function.lower(x).compile().as_text()
