"""A traced network equals the uncut one at every cut: loss, gradient and new state.

Exactly, where it is computed operation by operation: what XLA fuses differs with the program, by a
bit, and so does the order in which jax adds the cotangents of an array that jitted functions use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from stages.tracing.networks import Network
from tests.stages.support import assert_close
from tests.stages.tracing.networks import CASES, Case, batch


def make(case: Case) -> stages.Model:
    given = batch(case, 2)
    return stages.trace(case.network, given.get("", given), params=case.params)


#: Kinds that another one contains are left to `make soak`.
KINDS = [
    pytest.param(name, marks=pytest.mark.soak if name in ("lstm", "linen_encoder") else ())
    for name in CASES
]


@pytest.fixture(scope="module", params=KINDS)
def traced(request) -> tuple[Case, stages.Model]:
    return CASES[request.param], make(CASES[request.param])


def mean_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain(network: Network, params, state, inputs, labels, draw):
    """Loss, gradient and state of the network as the user wrote it."""

    def loss(params):
        y, after = network.call(params, state, inputs, draw=draw, train=True)
        return mean_loss(y, labels), after

    (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradient, after


def whole(model: stages.Model, params, state, inputs, labels, draw):
    """The same of all units one after another."""

    def loss(params):
        y, after = run(model.units, params, state, inputs, draw)
        return mean_loss(y, labels), after

    (value, after), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradient, after


def run(units, params, state, inputs, draw):
    """Units in training: what they return, and their new state."""
    (_, x), *side = inputs.items()
    after = {}
    for unit in units:
        x, after[unit.name] = unit.call(
            params[unit.name], state[unit.name], x, dict(side), draw=draw, train=True
        )
    return x, after


def cut(model: stages.Model, at: int, params, state, inputs, labels, draw):
    """The same, by two stages between which nothing but one array and its cotangent travel."""
    (name, _), *side = inputs.items()
    own, others = (
        {unit.name: params[unit.name] for unit in part}
        for part in (model.units[:at], model.units[at:])
    )

    def second(own, h):
        y, after = run(model.units[at:], own, state, {name: h, **dict(side)}, draw)
        return mean_loss(y, labels), after

    h, pull, before = jax.vjp(
        lambda own: run(model.units[:at], own, state, inputs, draw), own, has_aux=True
    )
    value, back, behind = jax.vjp(second, others, h, has_aux=True)
    gradient, cotangent = back(jnp.ones_like(value))
    return value, {**pull(cotangent)[0], **gradient}, {**before, **behind}


def by_path(model: stages.Model, variables) -> dict[str, jax.Array]:
    """Variables of units by their path in the network."""
    return {
        unit.names[path]: array
        for unit in model.units
        for path, array in variables[unit.name].items()
    }


def assert_equal(model: stages.Model, case: Case, samples: int) -> None:
    inputs = batch(case, samples)
    labels = jnp.arange(samples) % 3
    params, state = model.init(0)
    network = model.units[0].traced.network
    draw = stages.make_draw(samples, seed=3, step=2)
    given = params, state, inputs, labels, draw
    value, gradient, after = whole(model, *given)
    for at in range(1, len(model.units)):
        found = cut(model, at, *given)
        assert found[0] == value, at
        jax.tree.map(np.testing.assert_array_equal, found[1:], (gradient, after))
    assert sum(leaf.size for leaf in jax.tree.leaves(gradient)) == stages.parameter_count(model)
    network, held = model.units[0].traced.network, [by_path(model, one) for one in given[:2]]
    expected = plain(network, *held, inputs, labels, draw)
    actual = value, by_path(model, gradient), by_path(model, after)
    assert_close(actual, expected, 1e-5, 1e-6)


@pytest.mark.sampled(3)
def test_loss_gradient_and_state_are_the_uncut_networks_at_every_cut(traced):
    case, model = traced
    assert len(model.units) == case.cuts + 1
    assert_equal(model, case, 2)


@pytest.mark.sampled(3, 1)
def test_inference_is_the_uncut_networks(traced):
    case, model = traced
    inputs = batch(case, 3)
    params, state = model.init(1)
    (_, x), *side = inputs.items()
    held = (by_path(model, part) for part in (params, state))
    expected, _ = model.units[0].traced.network.call(*held, inputs, draw=None, train=False)
    for unit in model.units:
        x, _ = unit.call(params[unit.name], state[unit.name], x, dict(side), draw=None, train=False)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.soak
@pytest.mark.parametrize("samples", [1, 5, 8])
def test_every_batch_size_is_equal_too(traced, samples):
    assert_equal(traced[1], traced[0], samples)
