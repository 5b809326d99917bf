"""Frozen weights: no gradient, no state of an optimiser, one copy, the same result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stages
from tests.stages.support import step

X, LABELS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), jnp.arange(5) % 3


class Adapted(nnx.Module):
    """Linear layers with adapters of low rank."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)
        self.two = nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(nnx.relu(self.two(nnx.relu(self.one(x))))))


def traced() -> stages.Model:
    return stages.trace(Adapted, jnp.ones((1, 4)))


def by_hand() -> stages.Model:
    def unit(inputs, outputs):
        return lambda rngs: nnx.LoRALinear(inputs, outputs, lora_rank=2, rngs=rngs)

    units = [("one", unit(4, 6)), ("two", unit(6, 6)), ("head", unit(6, 3))]
    return stages.Model.from_units("adapted", units, (4,), 3)


@pytest.fixture(scope="module", params=[traced, by_hand])
def model(request) -> stages.Model:
    return request.param()


@pytest.mark.sampled(2, 1)
def test_what_is_trained_has_the_gradient_that_it_has_with_all_weights(model):
    some = model.training("lora", seed=2)
    params, state = model.init(2)
    own, same = some.init(2)
    assert all("lora" in path for arrays in own.values() for path in arrays)
    assert stages.parameter_count(some) == 2 * (4 + 6) + 2 * (6 + 6) + (
        2 * (6 + 3) if "lora/lora_a" in own["head"] else 0
    )
    loss, gradient, after = step(model, (1,), params, state, X, LABELS, 2)
    for cuts in ((), (1,), (1, 2)):
        found, partial, left = step(some, cuts, own, same, X, LABELS, 2)
        np.testing.assert_allclose(found["loss"], loss["loss"], rtol=1e-6)
        assert {unit: set(arrays) for unit, arrays in partial.items()} == {
            unit: set(arrays) for unit, arrays in own.items()
        }
        for unit, arrays in partial.items():
            for path, array in arrays.items():
                np.testing.assert_allclose(array, gradient[unit][path], rtol=2e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left, after)
    np.testing.assert_allclose(
        stages.predict(some, own, same, X), stages.predict(model, params, state, X), rtol=1e-5
    )
    whole = some.completed(own)
    assert {u: set(a) for u, a in whole.items()} == {u: set(a) for u, a in params.items()}
    jax.tree.map(np.testing.assert_array_equal, whole, {u: params[u] for u in whole})


def test_frozen_weights_have_no_state_of_an_optimiser_and_are_no_residuals(model):
    some = model.training("lora")
    params, state = some.init(0)
    states = stages.init_opt_state(params, optax.adam(0.1))
    moments = [leaf for leaf in jax.tree.leaves(states) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * stages.parameter_count(some)
    first, _ = stages.split(some, (1,))
    own, held = stages.select(first, params), stages.select(first, state)
    _, kept, _ = first.forward(own, held, X, stages.make_draw(5))
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(kept)}
    assert (4, 6) not in shapes  # neither the frozen kernel nor its transpose
    facts = stages.stage_facts(some, (1,), 5)
    assert facts[0].parameters == 2 * (4 + 6)


def test_a_process_draws_frozen_weights_of_its_own_stage_alone_and_once(model):
    some = model.training("lora")
    first, second = stages.split(some, (1,))
    assert set(first.fixed) == {"one"} and "one" not in second.fixed
    assert first.fixed["one"]["kernel"] is first.fixed["one"]["kernel"]
    assert first.frozen.shapes(("one",))["one"]["kernel"].shape == (4, 6)


def test_a_filter_of_flax_picks_what_is_trained(model):
    by_pattern, by_type = model.training("lora"), model.training(nnx.LoRAParam)
    for one, other in zip(by_pattern.units, by_type.units, strict=True):
        assert one.params.keys() == other.params.keys()
        assert one.frozen.keys() == other.frozen.keys()
    assert all(not unit.frozen for unit in by_type.unfrozen.units)


def test_stages_with_nothing_to_train_hand_the_cotangent_on(model):
    some = model.training("^head/")
    params, state = some.init(0)
    assert params["one"] == {} and params["two"] == {}
    _, gradient, _ = step(some, (1, 2), params, state, X, LABELS)
    whole = model.init(0)[0]
    _, expected, _ = step(model, (1, 2), whole, state, X, LABELS)
    for path, array in gradient["head"].items():
        np.testing.assert_allclose(array, expected["head"][path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ("adapter", r"no weight matches 'adapter', so nothing would be trained; its weights are o"),
        ("(", r"'\(' is not a regular expression: "),
        ("(" * 5000, "is not a regular expression: "),
        (nnx.Cache, "no weight matches"),
    ],
)  # fmt: skip
def test_what_picks_nothing_is_refused(model, chosen, says):
    with pytest.raises(stages.StageError, match=says):
        model.training(chosen)


def test_a_filter_of_flax_needs_nnx():
    model = stages.trace(
        lambda params, x: jnp.tanh(x @ params[0]) @ params[1],
        jnp.ones((1, 4)), params=[jnp.ones((4, 3)), jnp.ones((3, 3))],
    )  # fmt: skip
    with pytest.raises(stages.StageError, match="is for NNX modules; give a pattern"):
        model.training(nnx.LoRAParam)
