"""Networks that compute in bfloat16: gradients within its error, sums in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from tests.stages import support

#: How much larger an error may be than that of rounding weights and samples to bfloat16 once and
#: computing in float32: every layer rounds its output as well.
FACTOR = 4
WIDE = {"float32", "int32", "uint32"}


def build(name: str, dtype: object, norm: str) -> stages.Model:
    if name == "small_resnet":
        return support.small_resnet(dtype, norm)
    shape = (8,) if name.startswith("decoder") else (8, 8, 3)
    return stages.build(name, input_shape=shape, classes=5, norm=norm, dtype=dtype)


def sample(model: stages.Model):
    if model.input_dtype == jnp.int32:
        tokens = np.random.default_rng(0).integers(0, model.classes, (8, *model.input_shape))
        return jnp.asarray(tokens, jnp.int32), jnp.roll(jnp.asarray(tokens, jnp.int32), -1, 1)
    return support.batch(model, 8)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("cnn", "batch"),
        pytest.param("small_resnet", "group", marks=pytest.mark.soak),
        pytest.param("decoder_small", "group", marks=pytest.mark.soak),
    ],
)
def test_gradients_are_those_of_float32_within_the_error_of_bfloat16(name, norm):
    gradients = []
    for dtype, rounds in ((jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)):
        model = build(name, dtype, norm)
        params, state = model.init(0)
        params = jax.tree.map(stirred, params)
        x, y = sample(model)
        if rounds:
            params = jax.tree.map(rounded, params)
            x = x if x.dtype == jnp.int32 else rounded(x)
        middle = len(model.units) // 2
        _, sums, after = support.step(model, (middle,), params, state, x, y, micro_batches=2)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves((params, sums, after))} <= WIDE
        gradients.append(sums)
        assert model.shapes(4)[middle].dtype == dtype  # what crosses the cut
    exact, least, ours = gradients
    for unit, arrays in exact.items():
        for path, wanted in arrays.items():
            error, bound = (np.linalg.norm(g[unit][path] - wanted) for g in (ours, least))
            # Some gradients are zero but for rounding, such as that of a bias before a norm.
            noise = 0.01 * max(np.linalg.norm(one) for one in arrays.values())
            assert error <= FACTOR * bound + noise, (unit, path, error, bound)
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in leaves)


def stirred(array: jax.Array) -> jax.Array:
    """Weights that are zero at first would have gradients of zero below them."""
    noise = np.random.default_rng(array.size).normal(size=array.shape)
    return array + jnp.asarray(0.05 * noise, array.dtype)


def rounded(array: jax.Array) -> jax.Array:
    return array.astype(jnp.bfloat16).astype(jnp.float32)


def test_losses_are_summed_in_float32():
    """Steps of 1 at 300 are lost in bfloat16."""
    model = build("cnn", jnp.bfloat16, "group")
    params, state = model.init(0)
    x, y = support.batch(model, 512)
    metrics, _, _ = support.step(model, (), params, state, x, y)
    (whole,) = stages.split(model)
    logits = np.asarray(whole.predict(params, state, x), np.float64)
    exact = np.sum(np.log(np.sum(np.exp(logits), -1)) - logits[np.arange(512), y])
    assert abs(float(metrics["loss"]) - exact) < 1e-3 * exact
