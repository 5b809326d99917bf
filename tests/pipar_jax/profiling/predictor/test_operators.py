"""What units compute, read from shapes alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.profiling.predictor.operators import (
    FEATURES,
    KINDS,
    WIDTH,
    convolution,
    features,
    model_operators,
    rows,
)
from stages.layers import Conv, Dense, Flatten
from stages.layers.formulation import Formulation, forced
from tests.stages.tracing import networks


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.flatten, self.dense = Flatten(), Dense(8 * 8 * 6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.flatten(x))


def network() -> stages.Model:
    units = [
        ("wide", lambda rngs: Conv(3, 4, 5, rngs=rngs)),
        ("narrow", lambda rngs: Conv(4, 6, 3, stride=2, rngs=rngs)),
        ("head", Head),
    ]
    return stages.Model.from_units("two", units, (16, 16, 3), 5)


def test_a_convolution_is_what_the_formula_says():
    call, conv = model_operators(network(), (1,), 10)[0]
    assert call.kind == "call"
    (expected,) = convolution(10, 8, 4, 6, 3, 2)
    assert conv == expected
    assert conv.flops == 2 * 10 * 8 * 8 * 3 * 3 * 4 * 6


def test_samples_need_no_cotangent_and_activations_do():
    first, second = (model_operators(network(), (i,), 4)[0][1] for i in (0, 1))
    assert (first.pulled, second.pulled) == (0.0, 1.0)


def test_a_dense_layer_is_a_product_with_weights():
    (product,) = (one for one in model_operators(network(), (2,), 3)[0] if one.kind == "matmul")
    assert product.flops == 2 * 3 * 384 * 5
    assert product.weight_bytes == 4 * 384 * 5
    assert (product.inputs, product.outputs) == (384, 5)


def test_attention_multiplies_activations_which_are_no_weights():
    model = stages.build("vit_small", input_shape=(16, 16, 3), classes=4)
    products = [one for one in model_operators(model, (1,), 2)[0] if one.kind == "matmul"]
    assert len(products) == 6
    assert sum(one.weight_bytes == 0 for one in products) == 2


def test_operations_agree_with_the_compilers_own_count():
    model = stages.build("cnn", input_shape=(32, 32, 3), classes=10)
    with forced(Formulation.XLA):
        facts = stages.unit_facts(model, 8)[:-1]
    for operators, one in zip(model_operators(model, range(len(facts)), 8), facts, strict=True):
        # The compiler leaves out what falls on padding.
        assert sum(each.flops for each in operators) == pytest.approx(one.forward_flops, rel=0.35)


def test_what_is_found_does_not_depend_on_how_this_machine_computes():
    model = stages.build("cnn", input_shape=(16, 16, 3), classes=10)
    plain = model_operators(model, None, 8)
    with forced(Formulation.PATCHES):
        assert model_operators(model, None, 8) == plain


def test_work_grows_with_the_batch_and_weights_do_not():
    small, large = (model_operators(network(), (1,), batch)[0][1] for batch in (2, 20))
    assert large.flops == 10 * small.flops
    assert large.output_bytes == 10 * small.output_bytes
    assert large.weight_bytes == small.weight_bytes


def test_loops_calls_and_own_derivatives_are_looked_into():
    class Odd(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.scale = nnx.Param(jnp.ones((4,)))

        def __call__(self, x: jax.Array) -> jax.Array:
            x = jax.checkpoint(lambda y: jnp.sin(y) * self.scale[...])(x)
            x = jax.lax.cond(True, lambda y: y @ jnp.ones((4, 4)), lambda y: y, x)
            x, _ = jax.lax.scan(lambda y, _: (y @ jnp.ones((4, 4)), None), x, None, length=3)
            return jax.jit(jax.nn.relu)(x)

    model = stages.Model.from_units("odd", [("odd", Odd)], (4,), 4)
    kinds = [one.kind for one in model_operators(model, (0,), 2)[0]]
    assert kinds[0] == "call" and "elementwise" in kinds and "matmul" in kinds


def test_features_are_finite_and_name_the_kind():
    table = rows(one for unit in model_operators(network(), None, 4) for one in unit)
    assert table.shape[1] == WIDTH
    seen = features(table)
    assert seen.shape == (len(table), FEATURES)
    assert np.isfinite(seen).all()
    assert (seen[:, : len(KINDS)].sum(1) == 1).all()


def test_side_inputs_are_traced_like_samples():
    case = networks.CASES["lengths"]
    model = stages.trace(case.network, networks.batch(case, 2))
    found = model_operators(model, None, 6)
    assert len(found) == len(model.units) and all(found)


@pytest.mark.parametrize("steps", [3, 12])
def test_a_loop_counts_as_often_as_it_is_gone_through(steps):
    weights = jnp.ones((5, 5))

    def looped(params, x):
        x = jnp.tanh(x @ params["a"])

        def step(x, _):
            return jnp.tanh(x @ params["b"]), None

        return jax.lax.scan(step, x, None, length=steps)[0] @ params["c"]

    def written_out(params, x):
        x = jnp.tanh(x @ params["a"])
        for _ in range(steps):
            x = jnp.tanh(x @ params["b"])
        return x @ params["c"]

    params = {"a": weights, "b": weights, "c": weights}
    (one, other) = (
        [sum(each.flops for unit in model_operators(model, None, 4) for each in unit
             if each.kind == kind) for kind in ("matmul", "elementwise")]
        for model in (stages.trace(f, jnp.ones((1, 5)), params=params, whole=True)
                      for f in (looped, written_out))
    )  # fmt: skip
    assert one[0] == other[0] > 0 and one[1] == pytest.approx(other[1], rel=0.2)
