"""What tracing finds, how it names it, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import stages
from tests.patience import PROCESS_S
from tests.stages.support import step
from tests.stages.tracing import networks

ROW = jnp.ones((1, 4))


def test_units_are_named_by_their_modules_and_positions_that_are_no_cut_explained():
    model = stages.trace(networks.Residual, jnp.ones((1, 8, 8, 1)))
    assert model.name == "Residual" and model.classes == 3 and model.input_shape == (8, 8, 1)
    assert model.unit_names == ("stem", "blocks_0", "blocks_1", "head")
    assert set(model.units[1].params) == {
        "conv1/kernel", "conv2/kernel", "norm1/bias", "norm1/scale", "norm2/bias", "norm2/scale"
    }  # fmt: skip
    assert set(model.units[1].state) == {"norm1/mean", "norm1/var", "norm2/mean", "norm2/var"}
    assert [one.after for one in model.obstacles] == [
        "blocks/0/conv1 … blocks/0/conv2", "blocks/1/conv1 … blocks/1/conv2"
    ]  # fmt: skip
    assert model.obstacles[0].reason.startswith(
        "2 arrays are needed behind it, and only 1 can cross"
    )
    facts = stages.unit_facts(model, 4)
    assert facts[0].output_bytes == 4 * 8 * 8 * 2 * 4 and facts[1].forward_flops > 0


def test_what_crosses_begins_with_the_batch_even_where_the_network_is_time_major():
    model = stages.trace(networks.Lstm, jnp.ones((1, 5), jnp.int32))
    assert [one.shape for one in model.shapes(6)] == [(6, 5), (6, 5, 3), (6, 5, 4), (6, 4), (6, 3)]
    assert model.units[0].traced.base.boundaries[2].inside(6).shape == (5, 6, 4)


def test_an_axis_may_hold_several_rows_of_a_sample():
    def rows(params, x):
        x = jnp.tanh(x.reshape(-1, 2) @ params[0]["w"])  # [2 * batch, 3]
        return (x @ params[1]["w"]).reshape(-1, 6)

    params = [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 3))}]
    model = stages.trace(rows, ROW, params=params)
    assert [one.shape for one in model.shapes(5)] == [(5, 4), (5, 2, 3), (5, 6)]
    held, state = model.init(0)
    x = jnp.arange(12.0).reshape(3, 4) / 10
    np.testing.assert_array_equal(stages.predict(model, held, state, x), rows(params, x))


def test_tied_weights_are_never_separated():
    model = stages.trace(networks.TiedInside, ROW)
    assert model.unit_names == ("first", "twice_between", "last")
    (tied,) = model.obstacles
    assert tied.after == "twice" and tied.reason == "twice/bias is used on both sides"
    with pytest.raises(stages.StageError, match=r"cannot be cut anywhere; behind embed.*: "
                       r"embed/embedding is used on both sides.*whole=True"):  # fmt: skip
        stages.trace(networks.Tied, jnp.ones((1, 5), jnp.int32))
    whole = stages.trace(networks.Tied, jnp.ones((1, 5), jnp.int32), whole=True)
    assert len(whole.units) == 1 and whole.shapes(2)[-1].shape == (2, 5, 7)


def test_a_mask_made_of_the_input_asks_to_be_a_side_input():
    class Masked(networks.Lstm):
        def __call__(self, tokens):
            return super().__call__(tokens, (tokens > 0).sum(1) + 1)

    (reason,) = {one.reason for one in stages.trace(
        Masked, jnp.ones((1, 5), jnp.int32), whole=True).obstacles}  # fmt: skip
    assert reason.endswith("int32[2]; integers (masks, lengths) can be side inputs")


def test_side_inputs_reach_the_stages_that_take_them_and_no_others():
    case = networks.CASES["lengths"]
    model = stages.trace(case.network, networks.batch(case, 2))
    assert {name: one.shape for name, one in model.sides.items()} == {"lengths": ()}
    assert [unit.sides for unit in model.units] == [(), (), ("lengths",), ()]
    first, second = stages.split(model, (1,))
    assert (first.sides, second.sides) == ((), ("lengths",))
    params, state = model.init(0)
    tokens, lengths = networks.batch(case, 3).values()
    h = first.predict(stages.select(first, params), stages.select(first, state), tokens)
    own = stages.select(second, params), stages.select(second, state)
    side = {"lengths": lengths}
    expected = stages.predict(model, params, state, tokens, side)
    np.testing.assert_allclose(second.predict(*own, h, side), expected, rtol=1e-5, atol=1e-6)
    draw = stages.make_draw(3)
    labels = jnp.zeros(3, jnp.int32)
    y, kept, _ = first.forward(
        stages.select(first, params), stages.select(first, state), tokens, draw
    )
    _, cotangent, gradient, _ = second.loss(*own, y, labels, draw, second.zeros(own[0]), side)
    assert cotangent.shape == y.shape and float(jnp.abs(gradient["lstm_cell"]["hf/kernel"]).sum())
    first.backward(stages.select(first, params), kept, cotangent, first.zeros(
        stages.select(first, params)))  # fmt: skip
    with pytest.raises(stages.StageError, match=r"side inputs \['lengths'\] are missing; got"):
        second.predict(*own, h)


def test_a_module_keeps_its_weights_and_a_factory_draws_by_the_seed():
    module = networks.Dropped(nnx.Rngs(5))
    kept = stages.trace(module, ROW, name="kept")
    assert kept.name == "kept"
    for seed in (0, 1):
        params, _ = kept.init(seed, only=("two",))
        assert params.keys() == {"two"}
        np.testing.assert_array_equal(params["two"]["kernel"], module.two.kernel[...])
    drawn = stages.trace(networks.Dropped, ROW)
    a, b, again = (drawn.init(seed)[0]["one"]["kernel"] for seed in (0, 1, 0))
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, again)


def test_the_engines_stages_train_a_traced_network():
    """Compiled, with residuals and two micro-batches: equal but for rounding."""
    model = stages.trace(networks.perceptron, ROW, params=networks.layers)
    assert model.unit_names == ("unit_0", "unit_1", "unit_2")
    params, state = model.init(0)
    x, labels = networks.batch(networks.CASES["function"], 5)[""], jnp.arange(5) % 3
    _, expected, _ = step(model, (), params, state, x, labels)
    _, found, _ = step(model, (1, 2), params, state, x, labels, 2)
    for unit, arrays in expected.items():
        for path, array in arrays.items():
            np.testing.assert_allclose(found[unit][path], array, rtol=1e-5, atol=1e-6)


def test_a_plain_function_is_told_what_it_is_called_for():
    def noisy(params, x, key, train):
        noise = jax.random.normal(key, x.shape) if train else 0.0
        return jnp.tanh((x + noise) @ params["a"]["w"]) @ params["b"]["w"]

    params = {"a": {"w": jnp.ones((4, 4))}, "b": {"w": jnp.ones((4, 2))}, "c": jnp.arange(3)}
    model = stages.trace(noisy, ROW, params=params)
    assert model.unit_names == ("a", "b") and model.name == "noisy"
    assert "c" in model.units[0].state  # with nothing in common, the first by name
    held, state = model.init(0)
    still = stages.predict(model, held, state, ROW)
    np.testing.assert_allclose(still, 4 * np.tanh(4) * np.ones((1, 2)), rtol=1e-6)
    (whole,) = stages.split(model)
    losses = [
        whole.loss(held, state, ROW, jnp.zeros(1, jnp.int32), stages.make_draw(1, step=n),
                   whole.zeros(held))[2]["b"]["w"]
        for n in (0, 0, 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


def _two(params, x):
    return x @ params["w"], x


def _branch(params, x):
    return x @ params["w"] if x.sum() > 0 else x


def _mean(params, x):
    return (x @ params["w"]).mean(0)


def _whole_numbers(params, x):
    return jnp.argmax(x @ params["w"], -1)[:, None]


def _constant(params, x):
    return jnp.ones((x.shape[0], 1)) * params["w"].sum()


def _wider(params, x, train):
    return jnp.concatenate([x, x], -1) if train else x


class Bare(linen.Module):
    @linen.compact
    def __call__(self, x, y):
        return linen.Dense(3)(x + y)


W = {"w": jnp.ones((4, 3))}


@pytest.mark.parametrize(
    ("network", "example", "params", "says"),
    [
        (_two, ROW, W, "returned a tuple of 2, expected a single array: return what the loss is"),
        (_branch, ROW, W, "cannot be traced in training with .*test_trace.py:[0-9]+, in _branch"
         ".*use jnp and jax.lax instead of numpy, if and float"),
        (_mean, ROW, W, r"returns float32\[3\] for 2 samples, expected \[2, …\]"),
        (_whole_numbers, ROW, W, "returns int32, which has no gradient: return logits"),
        (_constant, ROW, W, "its output does not depend on its input"),
        (_wider, ROW, W, r"returns float32\[2, 8\] in training, but float32\[2, 4\] at inference"),
        (networks.perceptron, ROW, {"w": "text"}, "params is neither a pytree of arrays nor"),
        (Bare(), ROW, None, "Bare of flax.linen cannot be initialised with .*missing"),
        (networks.Cnn, jnp.ones((1, 9, 9, 3)), None, "cannot be traced in training with float32"),
        (lambda rngs: 3, ROW, None, "its factory returned int|expected a callable NNX module"),
        (3, ROW, None, "is a int, expected an NNX or Linen module"),
        (networks.Dropped(nnx.Rngs(0)), ROW, W, "holds its own: leave params out"),
        (networks.Cnn, 3, None, "the example is a int, expected a batch"),
        (networks.Cnn, jnp.ones(()), None, "expected a batch"),
        (networks.Cnn, {}, None, "an empty dictionary: give at least one batch"),
        (lambda params, x: x @ params["w"], ROW, W, "it has one module"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_refused_in_one_line(network, example, params, says):
    with pytest.raises(stages.StageError, match=says) as caught:
        stages.trace(network, example, params=params)
    assert "\n" not in str(caught.value)


UNUSED = """
import jax.numpy as jnp
import stages

params = {"a": {"w": jnp.ones((4, 4))}, "b": {"w": jnp.ones((4, 2))}}
params |= {f"unused{i}": jnp.arange(i + 1) for i in range(16)}
model = stages.trace(lambda p, x: jnp.tanh(x @ p["a"]["w"]) @ p["b"]["w"], jnp.ones((1, 4)),
                     params=params)
print([(unit.name, list(unit.params), list(unit.state)) for unit in model.units])
"""


@pytest.mark.soak
def test_hosts_agree_on_units_whatever_their_hashes_of_texts():
    found = {
        subprocess.run(
            [sys.executable, "-c", UNUSED], capture_output=True, text=True, check=True,
            timeout=PROCESS_S, env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    }  # fmt: skip
    assert len(found) == 1 and "unused15" in found.pop()


class Recurrent(nnx.Module):
    """Flax moves the axis of time to the front, so that two positions look alike."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 3, rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[:, -1])


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("function", "lengths") else [pytest.mark.soak])
    for name in networks.CASES
] + ["recurrent"])  # fmt: skip
def test_rows_that_cross_are_those_of_the_samples_however_many_there_are(name):
    """Also where there are as many samples as an array has entries along another axis."""
    case = networks.CASES.get(name) or networks.Case(Recurrent, networks.TOKENS, 2)
    made = {"params": case.params} if case.params is not None else {}
    model = stages.trace(case.network, networks.batch(case, 2), **made)
    params, state = model.init(0)
    sizes = {size for one in model.shapes(1) for size in one.shape[1:] if 1 < size < 9} - {2}
    for samples in sorted(sizes):
        x, *sides = networks.batch(case, samples).values()
        side = dict(zip(model.sides, sides, strict=True))
        for unit in model.units[:-1]:
            held = params[unit.name], state[unit.name]

            def call(x, side, unit=unit, held=held):
                return unit.call(*held, x, side, draw=stages.make_draw(len(x)), train=True)[0]

            y = jax.eval_shape(call, x, side)
            if unit.state or unit.draws:  # of which samples take part together
                x = call(x, side)
                continue
            alone = [call(x[i : i + 1], {n: s[i : i + 1] for n, s in side.items()})
                     for i in range(samples)]  # fmt: skip
            x = call(x, side)
            assert x.shape == y.shape
            np.testing.assert_allclose(x, np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_what_a_linen_module_sows_into_a_collection_of_its_own_is_dropped():
    class Sowing(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Dense(5)(x))
            self.sow("losses", "size", jnp.abs(x).mean())
            return linen.Dense(3)(x)

    model = stages.trace(Sowing(), ROW)
    assert not any(unit.state for unit in model.units)
    params, state = model.init(0)
    assert stages.predict(model, params, state, ROW).shape == (1, 3)
    (whole,) = stages.split(model)
    labels, draw = jnp.zeros(1, jnp.int32), stages.make_draw(1)
    *_, after = whole.loss(params, state, ROW, labels, draw, whole.zeros(params))
    assert not any(after.values())


def test_a_weight_that_is_written_under_a_transform_is_refused_and_no_other():
    class Writing(networks.Transformed):
        def __call__(self, x):
            def write(one, x):
                one.linear.bias.set_value(one.linear.bias.get_value() * 0.5)
                return one(x)

            return self.head(nnx.remat(write)(self.one, x))

    with pytest.raises(stages.StageError, match="writes into the weight 'one/linear/bias'"):
        stages.trace(Writing, ROW)


def test_two_variables_with_one_path_are_refused():
    """Keys may have slashes: one of the two would silently take the other's place."""
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": 2 * jnp.eye(4)}, "c": jnp.ones((4, 2))}
    with pytest.raises(stages.StageError, match=r"two variables have the path 'a/b'"):
        stages.trace(lambda p, x: jnp.tanh(x @ p["a/b"] @ p["a"]["b"]) @ p["c"], ROW, params=params)
