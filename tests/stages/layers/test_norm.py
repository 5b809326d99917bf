"""Normalisation: written-out backward passes equal derived ones; running statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from stages import context
from stages.layers.norm import BatchNorm, GroupNorm, group_count, make_norm
from stages.layers.norm_functions import batch_normalise, group_normalise
from tests.stages.support import pulled


def _plain_batch(x, scale, bias):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def _plain_group(x, scale, bias, groups):
    grouped = x.reshape(*x.shape[:3], groups, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    var = grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


@pytest.fixture
def arrays():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(3.0, 2.0, (4, 3, 5, 6)))
        scale, bias = (jnp.asarray(random.normal(size=6)) for _ in range(2))
        yield x, scale, bias, jnp.asarray(random.normal(size=x.shape))


def _compare(actual, expected, cotangent, *inputs):
    y, gradients = pulled(actual, cotangent, *inputs)
    z, wanted = pulled(expected, cotangent, *inputs)
    np.testing.assert_allclose(y, z, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_batch_normalisation_equals_the_derived_one(arrays):
    x, scale, bias, cotangent = arrays
    _compare(lambda *a: batch_normalise(*a)[0], _plain_batch, cotangent, x, scale, bias)
    _, mean, var = batch_normalise(x, scale, bias)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)))
    np.testing.assert_allclose(var, x.var((0, 1, 2)))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_normalisation_equals_the_derived_one(arrays, groups):
    x, scale, bias, cotangent = arrays
    size = 6 // groups
    group = jnp.kron(jnp.eye(groups), jnp.ones((size, size)) / size)
    _compare(
        lambda *a: group_normalise(*a, group),
        lambda *a: _plain_group(*a, groups),
        cotangent,
        x,
        scale,
        bias,
    )


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_an_offset_is_the_bias_of_the_layer_before(kind):
    layer = make_norm(kind, 8, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 3, 3, 8)), jnp.float32)
    offset = jnp.asarray(random.normal(size=8), jnp.float32)
    for train in (True, False):
        scope = context.Context(train=train, unit="u", samples=4, draw=stages.make_draw(4))
        with context.entered(scope):
            graph, variables = nnx.split(layer)
            one, two = (nnx.merge(graph, variables, copy=True) for _ in range(2))
            np.testing.assert_allclose(one(x, offset), two(x + offset), rtol=1e-4, atol=1e-5)
            if kind == "batch":
                np.testing.assert_allclose(one.mean[...], two.mean[...], rtol=1e-5, atol=1e-6)


def test_statistics_carry_no_gradient_and_offsets_of_batch_norm_none():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    graph, variables = nnx.split(layer)
    scope = context.Context(train=True, unit="u", samples=2, draw=stages.make_draw(2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)

    def use(offset):
        module = nnx.merge(graph, variables, copy=True)
        return (module(x, offset) ** 3).sum() + module.mean[...].sum()

    with context.entered(scope):
        np.testing.assert_array_equal(jax.grad(use)(jnp.ones(3)), 0)


def test_group_counts_leave_at_least_eight_channels():
    assert [group_count(n) for n in (4, 16, 24, 64, 256, 512)] == [1, 2, 3, 8, 32, 32]
    assert GroupNorm(24, rngs=nnx.Rngs(0)).groups == 3


def test_sixteen_bit_activations_keep_wide_statistics():
    layer = BatchNorm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = (1000 + jnp.arange(64.0).reshape(8, 8)).astype(jnp.bfloat16)
    scope = context.Context(train=True, unit="u", samples=8, draw=stages.make_draw(8))
    with context.entered(scope):
        y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert layer.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32).mean(), 0, atol=0.02)
