"""Split models equal the unsplit model, whatever the cut and the number of micro-batches."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from tests.stages.support import assert_close, batch, small_resnet, step


@pytest.fixture(scope="module")
def vgg():
    model = stages.build("vgg5", input_shape=(32, 32, 3), classes=10)
    params, state = model.init(3)
    x, y = batch(model, 6)
    return model, params, state, x, y, step(model, (), params, state, x, y)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_vgg5_split_at_every_cut_equals_the_whole(vgg, cut):
    model, params, state, x, y, whole = vgg
    assert_close(step(model, (cut,), params, state, x, y), whole, 1e-5, 1e-7)


def test_chain_with_a_stage_per_unit_equals_the_whole(vgg):
    model, params, state, x, y, whole = vgg
    assert_close(step(model, (1, 2, 3, 4), params, state, x, y), whole, 1e-5, 1e-7)


@pytest.mark.parametrize("rematerialise", [(True, False), (False, True)])
def test_rematerialised_stages_give_the_same_gradient(vgg, rematerialise):
    model, params, state, x, y, whole = vgg
    assert_close(step(model, (2,), params, state, x, y, 1, rematerialise), whole, 1e-5, 1e-7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_float64_whole_gradient_equals_jax_grad_of_the_mean_loss(norm):
    with jax.enable_x64(True):
        model = small_resnet(jnp.float64, norm)
        params, state = model.init(0)
        x, y = batch(model, 7, np.float64)
        draw = stages.make_draw(7, dtype=np.float64)

        def mean_loss(params):
            h = x
            for unit in model.units:
                h, _ = unit.call(params[unit.name], state[unit.name], h, {}, draw=draw, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(h, y)
            return losses.mean()

        value, expected = jax.jit(jax.value_and_grad(mean_loss))(params)
        metrics, actual, _ = step(model, (1, 3), params, state, x, y)
        np.testing.assert_allclose(metrics["loss"] / 7, value, rtol=1e-12)
        assert_close(actual, expected, 1e-12)


@pytest.mark.soak
def test_float64_every_cut_and_micro_batch_count_accumulates_the_mini_batch_gradient():
    with jax.enable_x64(True):
        model = small_resnet(jnp.float64, "group")
        params, state = model.init(0)
        # Six samples: four micro-batches do not divide them.
        x, y = batch(model, 6, np.float64)
        whole = step(model, (), params, state, x, y)
        settings = [*itertools.product([(1,), (2,), (3,)], [3, 4]), ((2,), 1), ((1, 2), 4)]
        for cuts, count in settings:
            assert_close(step(model, cuts, params, state, x, y, count), whole, 1e-9)


def test_running_statistics_decay_alike_for_every_number_of_micro_batches():
    model = small_resnet(norm="batch")
    params, state = model.init(0)
    x, y = batch(model, 8)
    # Eight copies of one sample: every ghost batch has the statistics of the whole.
    x, y = jnp.broadcast_to(x[:1], x.shape), jnp.broadcast_to(y[:1], y.shape)
    whole = step(model, (), params, state, x, y)[2]
    for count in (2, 8):
        assert_close(step(model, (2,), params, state, x, y, count)[2], whole, 1e-4, 1e-6)


def test_running_statistics_move_towards_the_batch_by_a_tenth():
    model = small_resnet(norm="batch")
    params, state = model.init(0)
    x, y = batch(model, 8)
    after = step(model, (), params, state, x, y)[2]
    h = stages.layers.Conv.__call__ is not None  # the layer is public
    assert h
    kernel = params["stem"]["conv/kernel"]
    y1 = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        after["stem"]["norm/mean"], 0.1 * y1.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(after["stem"]["norm/var"], 0.9 + 0.1 * y1.var((0, 1, 2)), rtol=1e-4)


def test_a_stage_repeats_bit_for_bit(vgg):
    model, params, state, x, y, whole = vgg
    again = step(model, (), params, state, x, y)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True)
    )


def test_predict_composes_over_cuts(vgg):
    model, params, state, x, _, _ = vgg
    first, second = stages.split(model, (2,))
    h = first.predict(stages.select(first, params), stages.select(first, state), x)
    y = second.predict(stages.select(second, params), stages.select(second, state), h)
    whole = stages.predict(model, params, state, x)
    np.testing.assert_allclose(y, whole, rtol=1e-4, atol=1e-5)
    assert y.shape == (6, 10)


@pytest.mark.parametrize("cuts", [(0,), (5,), (2, 2), (3, 1), (-1,)])
def test_illegal_cuts_are_refused(vgg, cuts):
    with pytest.raises(stages.StageError, match="strictly increasing positions"):
        stages.split(vgg[0], cuts)


def test_wrong_number_of_rematerialise_flags_is_refused(vgg):
    with pytest.raises(stages.StageError, match="one per stage"):
        stages.split(vgg[0], (1,), rematerialise=(True,))


def test_joining_parts_that_share_a_unit_is_refused(vgg):
    with pytest.raises(stages.StageError, match="more than one part"):
        stages.join([vgg[1], {"fc1": {}}])


def test_selecting_a_missing_unit_is_refused(vgg):
    (whole,) = stages.split(vgg[0])
    with pytest.raises(stages.StageError, match="fc2"):
        stages.select(whole, {name: {} for name in vgg[0].unit_names[:-1]})
