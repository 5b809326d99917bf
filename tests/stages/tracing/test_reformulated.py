"""Stages of a user's network compute what Flax does, with the formulations of stages.layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import stages
from stages.layers.formulation import Formulation, forced
from tests.stages.support import assert_close, step
from tests.stages.tracing.networks import CASES, Case, Cnn, Residual, batch

SAMPLES = 4
IMAGES = [name for name, case in CASES.items() if case.example == CASES["cnn"].example]


def flaxs_own(case: Case, variables, inputs, labels):
    """Loss, gradient and statistics of a network that is called as Flax is, by path."""
    params, state = variables

    def call(params):
        if isinstance(case.network, linen.Module):
            nest = lambda arrays: _nested(arrays)  # noqa: E731
            given = {"params": nest(params), "batch_stats": nest(state)}
            y, after = case.network.apply(given, inputs[""], train=True, mutable=["batch_stats"])
            return y, _flat(after["batch_stats"])
        module = case.network(nnx.Rngs(0))
        flat = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(module))}
        for path, array in {**params, **state}.items():
            flat[path].set_value(array)
        nnx.update(module, nnx.from_flat_state([(tuple(_keys(p)), v) for p, v in flat.items()]))
        y = module(inputs[""])
        left = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
        return y, {"/".join(map(str, path)): leaf.get_value() for path, leaf in left}

    def loss(params):
        y, after = call(params)
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), after

    (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradient, after


def _keys(path: str):
    return [int(part) if part.isdigit() else part for part in path.split("/")]


def _nested(arrays):
    tree: dict = {}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _flat(tree, before=""):
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{before}{name}/") if isinstance(value, dict) else {before + name: value}
        )
    return flat


def by_path(model: stages.Model, variables):
    """Variables of units by their path in the network."""
    return {
        unit.names[path]: array
        for unit in model.units
        for path, array in variables[unit.name].items()
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", IMAGES)
def test_a_stage_computes_what_flax_does(name):
    case = CASES[name]
    inputs, labels = batch(case, SAMPLES), jnp.arange(SAMPLES) % 3
    model = stages.trace(case.network, inputs[""])
    params, state = model.init(0)
    with forced(Formulation.PATCHES):
        metrics, gradient, after = step(model, (), params, state, inputs[""], labels)
    actual = metrics["loss"] / SAMPLES, by_path(model, gradient), by_path(model, after)
    held = by_path(model, params), by_path(model, state)
    assert_close(actual, flaxs_own(case, held, inputs, labels), 2e-5, 5e-6)


def test_a_reformulated_network_is_equal_where_it_is_cut_everywhere():
    case = CASES["residual"]
    inputs, labels = batch(case, SAMPLES), jnp.arange(SAMPLES) % 3
    model = stages.trace(Residual, inputs[""])
    params, state = model.init(0)
    with forced(Formulation.PATCHES):
        expected = step(model, (), params, state, inputs[""], labels)
        cuts = tuple(range(1, len(model.units)))
        actual = step(model, cuts, params, state, inputs[""], labels)
    assert_close(actual, expected, 1e-5, 1e-6)


def test_units_of_the_users_own_are_reformulated_and_ours_are_not():
    class Unit(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(x)

    units = [("conv", Unit), ("rest", lambda rngs: Head(rngs))]
    model = stages.Model.from_units("own", units, (8, 8, 1), 3)
    assert not any(unit.is_ours for unit in model.units)
    given = jnp.ones((SAMPLES, 8, 8, 1)), jnp.arange(SAMPLES) % 3
    variables = model.init(0)
    results = []
    for formulation in (Formulation.XLA, Formulation.PATCHES):
        model.programs.clear()
        with forced(formulation):
            results.append(step(model, (1,), *variables, *given))
    assert_close(results[1], results[0], 1e-5, 1e-6)
    ours = stages.build("cnn", input_shape=(8, 8, 1), classes=3)
    assert all(unit.is_ours for unit in ours.units)
    traced = stages.trace(Cnn, given[0])
    assert not any(unit.is_ours for unit in traced.units)


class Head(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x.max((1, 2)))
