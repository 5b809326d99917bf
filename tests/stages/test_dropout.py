"""Dropout's mask belongs to the sample: neither cut nor micro-batches change it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from stages import context
from stages.layers import Dense, Dropout
from tests.stages.support import assert_close, batch, step


class Block(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.dense = Dense(inputs, outputs, rngs=rngs)
        self.before, self.after = Dropout(0.3), Dropout(0.3)

    def __call__(self, x):
        return self.after(jnp.tanh(self.dense(self.before(x))))


@functools.cache
def _model():
    units = [
        ("a", lambda rngs: Block(6, 16, rngs)),
        ("b", lambda rngs: Block(16, 16, rngs)),
        ("c", lambda rngs: Dense(16, 3, rngs=rngs)),
    ]
    return stages.Model.from_units("dropped", units, (6,), 3)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cuts", [(), (1,), (2,)])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_gradients_do_not_depend_on_cut_or_micro_batches(cuts, count):
    model = _model()
    params, state = model.init(0)
    x, y = batch(model, 6)
    whole = step(model, (), params, state, x, y, seed=3, device=1, step=2)
    actual = step(model, cuts, params, state, x, y, count, seed=3, device=1, step=2)
    assert_close(actual, whole, 1e-5)


def _mask(**draw):
    scope = context.Context(train=True, unit="a", samples=8, draw=stages.make_draw(8, **draw))
    with context.entered(scope):
        layer = Dropout(0.5)
        x = jnp.ones((8, 64))
        return np.asarray(layer(x)), np.asarray(layer(x))


def test_draws_differ_by_seed_device_step_position_and_place():
    base, second_layer = _mask()
    assert not np.array_equal(base, second_layer)
    for change in ({"seed": 1}, {"device": 1}, {"step": 1}, {"position": 1}):
        assert not np.array_equal(base, _mask(**change)[0])
    np.testing.assert_array_equal(base, _mask()[0])
    np.testing.assert_array_equal(base[3:], _mask(position=3)[0][:5])
    assert set(np.unique(base)) == {0.0, 2.0}
    assert abs(base.mean() - 1) < 0.15
    assert len(np.unique(base, axis=0)) == 8


def test_nothing_is_dropped_at_inference():
    model = _model()
    params, state = model.init(0)
    x, _ = batch(model, 4)
    a = stages.predict(model, params, state, x)
    assert jnp.array_equal(a, stages.predict(model, params, state, x))
    x = jnp.ones((2, 3))
    assert Dropout(0.9)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(stages.StageError, match="dropout rate"):
        Dropout(rate)


def test_grad_of_jit_is_unaffected_by_the_trace_context():
    assert context.current().train is False
    assert jax.jit(Dropout(0.5))(jnp.ones(3)).sum() == 3
