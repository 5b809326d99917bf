"""The gradient of a mini-batch, added up over micro-batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from stages.accumulation import add
from tests.stages.support import batch, small_resnet

LEFT_OVER = [np.nan, np.inf, 1.0]


@pytest.mark.parametrize("left", LEFT_OVER)
def test_what_another_mini_batch_has_left_is_replaced(left):
    """By the first micro-batch, bit for bit as if it were the only one; the second is added."""
    model = small_resnet()
    params, state = model.init(0)
    x, y = batch(model, 4)
    draw = stages.make_draw(4)
    first, last = stages.split(model, (2,))
    own = [stages.select(stage, params) for stage in (first, last)]
    stats = [stages.select(stage, state) for stage in (first, last)]

    def run(held, fresh):
        h, kept, _ = first.forward(own[0], stats[0], x, draw)
        _, cotangent, above, _ = last.loss(own[1], stats[1], h, y, draw, held[1], fresh=fresh)
        return first.backward(own[0], kept, cotangent, held[0], fresh=fresh)[1], above

    alone = run((None, None), False)
    used = [jax.tree.map(lambda leaf: jnp.full_like(leaf, left), tree) for tree in own]
    once = run(used, True)
    jax.tree.map(np.testing.assert_array_equal, once, alone)
    twice = run(once, False)
    jax.tree.map(lambda two, one: np.testing.assert_allclose(two, 2 * one, rtol=1e-6), twice, alone)


def test_without_an_accumulator_the_gradient_is_the_sum():
    gradient = {"unit": {"w": jnp.ones(2)}}
    assert add(None, gradient, np.bool_(False)) is gradient
