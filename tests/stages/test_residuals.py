"""Residuals hold no weights, and nothing twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stages
from stages.layers import Dense
from tests.stages.support import batch


class Wide(nnx.Module):
    """A dense layer whose weights dwarf its activations."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Dense(256, 2048, rngs=rngs)
        self.second = Dense(2048, 256, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.second(jnp.tanh(self.first(x))))


def _wide(dtype=jnp.float32):
    def scaled(rngs: nnx.Rngs) -> nnx.Module:
        return Dense(256, 4, dtype=dtype, rngs=rngs)

    return stages.Model.from_units("wide", [("body", Wide), ("head", scaled)], (256,), 4)


def test_residual_bytes_exclude_the_weights():
    model = _wide()
    params, state = model.init(0)
    first, _ = stages.split(model, (1,))
    own = stages.select(first, params)
    x, _ = batch(model, 2)
    _, residuals, _ = first.forward(own, stages.select(first, state), x, stages.make_draw(2))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    # tanh keeps its result, the second layer its input, the first its input.
    assert residuals.nbytes <= 2 * 4 * (256 + 2 * 2048 + 2 * 256)
    assert residuals.nbytes < weight_bytes / 50


def test_inputs_and_outputs_are_kept_by_reference():
    model = _wide()
    params, state = model.init(0)
    first, _ = stages.split(model, (1,))
    x, _ = batch(model, 2)
    y, residuals, _ = first.forward(
        stages.select(first, params), stages.select(first, state), x, stages.make_draw(2)
    )
    assert any(leaf is x for leaf in residuals.borrowed)
    assert residuals.output is y or residuals.output is None
    pointers = [leaf.unsafe_buffer_pointer() for leaf in residuals.saved]
    assert len(set(pointers)) == len(pointers)


def test_casts_of_weights_are_computed_again_rather_than_kept():
    def cast(rngs: nnx.Rngs) -> nnx.Module:
        return Dense(512, 512, dtype=jnp.bfloat16, rngs=rngs)

    def head(rngs: nnx.Rngs) -> nnx.Module:
        return Dense(512, 4, rngs=rngs)

    model = stages.Model.from_units("cast", [("body", cast), ("head", head)], (512,), 4)
    params, state = model.init(0)
    first, _ = stages.split(model, (1,))
    x, _ = batch(model, 1)
    own = stages.select(first, params)
    y, residuals, _ = first.forward(own, stages.select(first, state), x, stages.make_draw(1))
    assert residuals.nbytes < 10_000
    _, gradient = first.backward(own, residuals, jnp.ones_like(y), first.zeros(own))
    expected = jnp.outer(x[0].astype(jnp.bfloat16).astype(jnp.float32), jnp.ones(512))
    np.testing.assert_allclose(gradient["body"]["kernel"], expected, rtol=1e-2)


def test_every_registered_network_keeps_no_weights():
    for name, shape in (("vgg5", (32, 32, 3)), ("cnn", (8, 8, 1))):
        model = stages.build(name, input_shape=shape, classes=10)
        params, state = model.init(0)
        first, _ = stages.split(model, (len(model.units) - 1,))
        own = stages.select(first, params)
        x, _ = batch(model, 1)
        _, residuals, _ = first.forward(own, stages.select(first, state), x, stages.make_draw(1))
        shapes = {leaf.shape for unit in own.values() for leaf in unit.values() if leaf.ndim > 1}
        assert not shapes & {leaf.shape for leaf in jax.tree.leaves(residuals)}


def test_rematerialised_stage_keeps_its_input_alone():
    model = stages.build("vgg5", input_shape=(32, 32, 3), classes=10)
    params, state = model.init(0)
    x, _ = batch(model, 2)
    plain, _ = stages.split(model, (3,))
    lean, _ = stages.split(model, (3,), rematerialise=True)
    own, stats = stages.select(plain, params), stages.select(plain, state)
    full = plain.forward(own, stats, x, stages.make_draw(2))[1].nbytes
    kept = lean.forward(own, stats, x, stages.make_draw(2))[1].nbytes
    assert kept < x.nbytes + 4096 < full / 5


def test_accumulator_is_donated():
    model = _wide()
    params, state = model.init(0)
    (whole,) = stages.split(model)
    x, y = batch(model, 2)
    before = whole.zeros(params)
    _, _, after, _ = whole.loss(params, state, x, y, stages.make_draw(2), before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, params)))
