"""Optimiser updates, unit by unit."""

from __future__ import annotations

import jax
import numpy as np
import optax

import stages
from tests.stages.support import batch, small_resnet, step


def test_update_equals_optax_on_the_whole_and_leaves_the_gradient():
    model = small_resnet()
    params, state = model.init(0)
    x, y = batch(model, 4)
    tx = optax.sgd(0.1, momentum=0.9)
    _, gradient, _ = step(model, (), params, state, x, y)
    reference = params
    whole_state = tx.init(reference)
    own, opt_state, update = params, stages.init_opt_state(params, tx), stages.make_update(tx)
    own = jax.tree.map(lambda a: a.copy(), own)
    for _ in range(3):
        updates, whole_state = tx.update(gradient, whole_state, reference)
        reference = optax.apply_updates(reference, updates)
        handed = jax.tree.map(lambda a: a.copy(), gradient)
        donated = (own, opt_state)
        own, opt_state = update(own, opt_state, handed)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        jax.tree.map(np.testing.assert_array_equal, handed, gradient)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_optimiser_state_is_kept_per_unit():
    model = small_resnet()
    params, _ = model.init(0)
    tx = optax.adam(1e-3)
    opt_state = stages.init_opt_state(params, tx)
    assert tuple(opt_state) == model.unit_names
    for unit in model.unit_names:
        expected = jax.tree.structure((tx.init(params[unit]),))
        assert jax.tree.structure(opt_state[unit]) == expected
