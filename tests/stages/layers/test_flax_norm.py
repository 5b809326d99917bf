"""Flax's own batch normalisation with a written-out backward pass equals Flax's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from stages.layers.flax_norm import linen_batch_norm, write_out
from tests.stages.support import pulled

#: Options of a layer, and whether it is ours that is computed.
OPTIONS = {
    "plain": ({}, True),
    "two passes": ({"use_fast_variance": False}, True),
    "no scale": ({"use_scale": False}, True),
    "no bias": ({"use_bias": False}, True),
    "epsilon": ({"epsilon": 0.1}, True),
    "last axis": ({"axis": 3}, True),
    "dtype": ({"dtype": jnp.float64}, True),
    "another axis": ({"axis": 1}, False),
    "another dtype": ({"dtype": jnp.float32}, False),
}


def drawn(size):
    """Input, cotangent and variables, float64."""
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(3.0, 2.0, (4, 3, 5, 6))) for _ in range(2))
    variables = {name: random.normal(size=size) for name in ("scale", "bias", "mean", "var")}
    return x, cotangent, {name: jnp.asarray(array) for name, array in variables.items()}


def assert_equal(actual, expected, exactly):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_nnx(name):
    options, ours = OPTIONS[name]
    with jax.enable_x64(True):
        size = 3 if options.get("axis") == 1 else 6
        x, cotangent, variables = drawn(size)
        layer = nnx.BatchNorm(size, momentum=0.8, rngs=nnx.Rngs(0), **options)
        graph, held = nnx.split(layer)

        def run(swapped, x, arrays):
            module = nnx.merge(graph, held, copy=True)
            for path, array in arrays.items():
                if getattr(module, path) is not None:
                    getattr(module, path).set_value(array)
            if swapped:
                write_out(module)
            return module(x), (module.mean.get_value(), module.var.get_value())

        def pull(swapped):
            def output(x, arrays):
                return run(swapped, x, arrays)[0].astype(x.dtype)

            after = jax.jit(lambda: run(swapped, x, variables)[1])()
            return pulled(output, cotangent, x, variables), after

        assert_equal(pull(True), pull(False), exactly=not ours)
        text = str(jax.make_jaxpr(lambda x: run(True, x, variables))(x))
        assert ("custom_vjp_call" in text) == ours


@pytest.mark.parametrize("name", OPTIONS)
def test_linen(name):
    options, ours = OPTIONS[name]
    with jax.enable_x64(True):
        x, cotangent, variables = drawn(3 if options.get("axis") == 1 else 6)
        module = linen.BatchNorm(False, momentum=0.8, param_dtype=jnp.float64, **options)
        kept = [one for one in ("scale", "bias") if getattr(module, f"use_{one}")]
        params = {one: variables[one] for one in kept}
        stats = {one: variables[one] for one in ("mean", "var")}
        used = []

        def intercept(call, args, kwargs, at):
            if at.method_name != "__call__":
                return call(*args, **kwargs)
            y = linen_batch_norm(at.module, at.module.momentum, *args, **kwargs)
            used.append(y is not None)
            return call(*args, **kwargs) if y is None else y

        def run(x, params):
            given = {"params": params, "batch_stats": stats}
            return module.apply(given, x, mutable=["batch_stats"])

        def pull():
            output = lambda x, params: run(x, params)[0].astype(x.dtype)  # noqa: E731
            return pulled(output, cotangent, x, params), jax.jit(lambda: run(x, params)[1])()

        expected = pull()
        with linen.intercept_methods(intercept):
            actual = pull()
        assert_equal(actual, expected, exactly=not ours)
        assert set(used) == {ours}


def test_a_mask_and_running_averages_are_left_to_flax():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 5)), jnp.float32)
    mask = jnp.asarray(random.integers(0, 2, (4, 1)), bool)
    for given in ({"mask": mask}, {"use_running_average": True}):
        layers = [nnx.BatchNorm(5, rngs=nnx.Rngs(0)) for _ in range(2)]
        write_out(layers[1])
        outputs = [layer(x, **given) for layer in layers]
        np.testing.assert_array_equal(*outputs)
        np.testing.assert_array_equal(*(layer.mean.get_value() for layer in layers))


def test_a_subclass_of_the_users_keeps_its_own_call():
    class Own(nnx.BatchNorm):
        def __call__(self, x):
            return 2 * x

    layer = Own(5, rngs=nnx.Rngs(0))
    write_out(layer)
    assert type(layer) is Own
