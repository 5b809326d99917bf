"""Releases of a stage: bounded by the clip, noised as claimed, and of each sample alone."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import stages
import stages.layers
from pipar_jax.privacy.noise import NoiseSource
from stages.release import (
    CLIPPED,
    PrivateRelease,
    add_noise,
    bits_shape,
    clip_samples,
    clip_tree,
    examples_at_a_time,
    normal,
    tree_norm_squared,
)

SHAPE, CLASSES, CUT = (6, 6, 1), 4, 2


@pytest.fixture(scope="module")
def model():
    return stages.build("cnn", input_shape=SHAPE, classes=CLASSES, norm="group")


def release(model, **values):
    return PrivateRelease(shape=tuple(model.shapes(1)[CUT].shape[1:]), **values)


def parts(model, *releases):
    made = stages.split(model, (CUT,), releases={i: one for i, one in enumerate(releases) if one})
    params, state = model.init(0)
    return [(s, stages.select(s, params), stages.select(s, state)) for s in made]


def samples(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *SHAPE)), jnp.float32)


def bits(of, count, seed=1):
    return np.random.default_rng(seed).integers(0, 2**32, of.bits_shape(count), np.uint32)


def forward(part, x, of, noise=None):
    stage, params, state = part
    draw = stages.make_draw(len(x))._replace(noise=bits(of, len(x)) if noise is None else noise)
    return stage.forward(params, state, x, draw)


def norms(y):
    return np.linalg.norm(np.asarray(y, np.float64).reshape(len(y), -1), axis=1)


def test_numbers_are_normal():
    from scipy.stats import kstest

    count = 200_001  # odd: the last pair is half used
    made = normal(NoiseSource().bits(*bits_shape(count)), (count,), jnp.float32)
    found = np.asarray(made, np.float64)
    assert kstest(found, "norm").pvalue > 1e-6
    assert np.std(found) == pytest.approx(1, abs=0.01)
    # Both numbers of a pair come from one radius, and are independent nevertheless.
    first, second = found[: count // 2], found[-(count // 2) :]
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.02


@pytest.mark.parametrize(("high", "low", "radius"), [
    (0, 0, 9.4925),  # the farthest: sqrt(130 log 2)
    (0, 2**32 - 1, 6.6604),
    (1, 2**31, 6.5993),
    (2**32 - 1, 2**32 - 1, 0.0),
])  # fmt: skip
def test_the_tail_ends_where_it_is_said_to(high, low, radius):
    extremes = np.array([[high] * 2, [low] * 2, [0, 2**31]], np.uint32)
    found = np.asarray(normal(extremes, (4,), jnp.float32))
    np.testing.assert_allclose(found, [radius, -radius, 0, 0], atol=1e-3)


def test_a_whole_sample_is_clipped_and_what_is_not_finite_is_zero():
    x = np.array([[3.0, 4.0], [0.3, 0.4], [np.nan, 1.0], [np.inf, 0.0], [0.0, 0.0], [3e38, 3e38]])
    found = np.asarray(clip_samples(jnp.asarray(x, jnp.float32), 1.0))
    np.testing.assert_allclose(found[:2], [[0.6, 0.8], [0.3, 0.4]], rtol=2e-5)
    assert norms(found).max() <= 1.0
    np.testing.assert_array_equal(found[2:], 0)
    gradient = jax.grad(lambda x: clip_samples(x, 1.0).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient, 1)
    tree = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    assert float(tree_norm_squared(clip_tree(tree, 1.0))) == pytest.approx(1, rel=1e-4)
    assert float(tree_norm_squared(clip_tree({"a": jnp.array([jnp.nan, 1.0])}, 1.0))) == 0


def claimed(model, of, part):
    """The deviation of what is added to a clipped activation, divided by the claimed one."""
    x = samples(64)
    plain, *_ = forward(parts(model)[0], x, of)
    sent, *_ = forward(part, x, of, noise=NoiseSource().bits(*of.bits_shape(64)))
    added = np.asarray(sent - clip_samples(plain, of.activation_clip), np.float64)
    return float(np.std(added)) / (of.noise * of.activation_clip)


def test_the_noise_of_an_activation_has_the_claimed_variance(model):
    of = release(model, noise=3.0, activation_clip=0.5, gradient_clip=1.0)
    assert claimed(model, of, parts(model, of)[0]) == pytest.approx(1, abs=0.02)


def test_noise_that_is_halved_in_the_code_is_noticed(model, monkeypatch):
    of = release(model, noise=3.1, activation_clip=0.5, gradient_clip=1.0)
    monkeypatch.setattr("stages.release.normal", lambda *of: normal(*of) / 2)
    assert claimed(model, of, parts(model, of)[0]) == pytest.approx(0.5, abs=0.02)


def test_a_sample_changes_its_own_activation_alone_and_by_twice_the_clip_at_most(model):
    of = release(model, noise=1.0, activation_clip=0.25, gradient_clip=1.0)
    part = parts(model, of)[0]
    x = samples(5)
    other = x.at[2].set(1e4 * samples(1, seed=9)[0])
    same = bits(of, 5)
    first, *_ = forward(part, x, of, same)
    second, *_ = forward(part, other, of, same)
    changed = norms(np.asarray(second) - np.asarray(first))
    assert changed[2] <= 0.5 and np.all(changed[[0, 1, 3, 4]] == 0)


def gradients(model, of, x, labels, cotangent=None, micro=None, counts=None):
    """The device part's summed gradient, by way of micro-batches; ``counts`` takes what clipped."""
    below, above = parts(model, of)
    stage, params, state = below
    total = stage.zeros(params)
    first = 0
    for size in micro or [len(x)]:
        part = slice(first, first + size)
        draw = stages.make_draw(len(x), position=first)
        y, residuals, _ = stage.forward(
            params, state, x[part], draw._replace(noise=np.zeros(of.bits_shape(size), np.uint32))
        )
        if cotangent is None:
            _, given, _, _ = above[0].loss(
                above[1], above[2], y, labels[part], draw, above[0].zeros(above[1])
            )
        else:
            given = cotangent[part]
        above, total = stage.backward(params, residuals, given, total)
        if counts is not None:
            counts.append(np.asarray(above))
        first += size
    return total


def test_an_example_changes_the_sum_of_gradients_by_twice_the_clip_at_most(model):
    of = release(model, noise=1.0, activation_clip=1.0, gradient_clip=0.01)
    x, labels = samples(6), jnp.arange(6, dtype=jnp.int32) % CLASSES
    given = jnp.asarray(np.random.default_rng(3).normal(size=(6, *of.shape)), jnp.float32)
    first = gradients(model, of, x, labels, given)
    second = gradients(model, of, x.at[4].set(samples(1, seed=5)[0]), labels, given.at[4].mul(1e6))
    changed = jax.tree.map(jnp.subtract, second, first)
    bound = 2 * of.gradient_clip / 6
    assert bound / 2 < float(jnp.sqrt(tree_norm_squared(changed))) <= bound
    broken = gradients(model, of, x, labels, given.at[1].set(jnp.nan))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(broken))


def test_clipped_gradients_are_those_of_a_loop_over_examples(model):
    of = release(model, noise=1.0, activation_clip=2.0, gradient_clip=0.05)
    x, labels = samples(7), jnp.arange(7, dtype=jnp.int32) % CLASSES
    given = jnp.asarray(np.random.default_rng(4).normal(size=(7, *of.shape)), jnp.float32)
    stage, params, state = parts(model)[0]

    def example(params, i):
        y, *_ = stage.forward(params, state, x[i : i + 1], stages.make_draw(7))
        return jnp.vdot(clip_samples(y, 2.0), given[i : i + 1])

    total = jax.tree.map(jnp.zeros_like, params)
    for i in range(7):
        one = clip_tree(jax.grad(example)(params, i), of.gradient_clip / 7)
        total = jax.tree.map(jnp.add, total, one)
    for micro in ([7], [3, 2, 2]):
        found = gradients(model, of, x, labels, given, micro)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                     found, total)  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("jax_privacy") is None, reason="jax-privacy is not installed"
)
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")
@pytest.mark.parametrize("clip", [1e-4, 0.05, 1e3])
def test_clipped_gradients_are_those_of_jax_privacy(model, clip):
    """An oracle for the whole sum: of all examples clipped, some, and none."""
    from jax_privacy import clipped_grad

    count = 7
    of = release(model, noise=1.0, activation_clip=2.0, gradient_clip=clip)
    x, labels = samples(count), jnp.arange(count, dtype=jnp.int32) % CLASSES
    given = jnp.asarray(np.random.default_rng(4).normal(size=(count, *of.shape)), jnp.float32)
    stage, params, state = parts(model)[0]

    def example(params, x, cotangent):  # a batch of one
        y, *_ = stage.forward(params, state, x, stages.make_draw(count))
        return jnp.vdot(clip_samples(y, 2.0), cotangent)

    oracle = clipped_grad(example, l2_clip_norm=clip / count, batch_argnums=(1, 2))
    found, expected = gradients(model, of, x, labels, given, [4, 3]), oracle(params, x, given)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_what_was_clipped_is_counted(model):
    """For the device alone; by looking at every sample and example."""
    x, labels = samples(7), jnp.arange(7, dtype=jnp.int32) % CLASSES
    given = jnp.asarray(
        np.random.default_rng(4).normal(size=(7, *release(model, noise=1.0).shape)), jnp.float32
    )
    plain, *_ = forward(parts(model)[0], x, release(model, noise=1.0))
    middle = float(np.sort(norms(plain))[2:4].mean())
    of = release(model, noise=1.0, activation_clip=middle, gradient_clip=1e-6)
    counts = []
    gradients(model, of, x, labels, given, [4, 3], counts)
    assert sum(counts).tolist() == [4, 7, 0]
    # A last stage counts among its metrics.
    high = release(model, noise=1.0, cotangent_clip=1e-9, gradient_clip=1e6)
    stage, params, state = parts(model, None, high)[1]
    draw = stages.make_draw(7)._replace(noise=bits(high, 7))
    metrics, *_ = stage.loss(params, state, plain, labels, draw, stage.zeros(params))
    assert metrics[CLIPPED].tolist() == [0, 0, 7]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("together", [3, 7])
def test_gradients_are_summed_in_pieces_that_fit(model, monkeypatch, together):
    of = release(model, noise=1.0, activation_clip=2.0, gradient_clip=0.06)
    x, labels = samples(7), jnp.arange(7, dtype=jnp.int32) % CLASSES
    whole = gradients(model, of, x, labels)
    monkeypatch.setattr(stages.release, "examples_at_a_time", lambda params, count: together)
    model.programs.clear()
    pieces = gradients(model, of, x, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                 whole, pieces)  # fmt: skip


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_on_a_cpu_examples_follow_one_another_and_elsewhere_as_many_as_fit(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    large = {"w": jax.ShapeDtypeStruct((1 << 26,), jnp.float32)}
    assert examples_at_a_time(large, 100) == 1
    assert examples_at_a_time({}, 2) == (1 if platform == "cpu" else 2)
    assert examples_at_a_time({}, 200) == (1 if platform == "cpu" else 64)


def test_the_noise_of_a_gradient_has_the_claimed_variance():
    total = {"u": {"a": jnp.zeros((300, 100)), "b": jnp.zeros(2000, jnp.bfloat16)}}
    found = add_noise(total, NoiseSource().bits(*bits_shape(32_000)), np.float32(0.7))
    assert np.std(np.asarray(found["u"]["a"])) == pytest.approx(0.7, rel=0.02)
    assert found["u"]["b"].dtype == jnp.bfloat16
    assert np.std(np.asarray(found["u"]["b"], np.float32)) == pytest.approx(0.7, rel=0.1)


def test_the_cotangent_of_a_last_stage_is_clipped_and_noised(model):
    clip, count = 0.01, 8
    of = release(model, noise=2.0, cotangent_clip=clip, gradient_clip=0.5)
    quiet = release(model, noise=1e-9, cotangent_clip=clip, gradient_clip=0.5)
    x, labels = samples(count), jnp.arange(count, dtype=jnp.int32) % CLASSES
    y, *_ = forward(parts(model)[0], x, of)
    found = []
    for one in (of, quiet):
        stage, params, state = parts(model, None, one)[1]
        noise = NoiseSource().bits(*one.bits_shape(count))
        draw = stages.make_draw(count)._replace(noise=noise)
        metrics, cotangent, *_ = stage.loss(params, state, y, labels, draw, stage.zeros(params))
        found.append(np.asarray(cotangent, np.float64))
        assert np.isfinite(float(metrics["loss"]))
    assert norms(found[1]).max() <= clip / count * (1 + 1e-6)
    assert np.std(found[0] - found[1]) == pytest.approx(2.0 * clip / count, rel=0.1)


class Attentive(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, decode=False, rngs=rngs)
        self.last = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.attention(x[:, None] * jnp.ones((3, 1))).mean(1))


class OurDropout(nnx.Module):
    def __init__(self, rngs):
        self.drop = stages.layers.Dropout(0.5)
        self.last = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(x))


class LinenDropout(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(3, use_bias=False)(linen.Dense(3, use_bias=False)(x))


def noisy(params, x, key, train):
    x = x * jax.random.bernoulli(key, 0.5, x.shape) if train else x
    return (x @ params["a"]) @ params["b"]


def drawing_models():
    """Models whose first unit is linear in its last weights, and draws."""
    head = ("head", lambda rngs: nnx.Linear(3, 3, rngs=rngs))
    for made in (Attentive, OurDropout):
        yield made.__name__, stages.Model.from_units("two", [("own", made), head], (4,), 3)
    yield "linen", stages.trace(LinenDropout(), jnp.ones((1, 4)))
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 3))}
    yield "function", stages.trace(noisy, jnp.ones((1, 4)), params=params)


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("name", "model"), list(drawing_models()), ids=lambda one: str(one)[:10])
def test_the_gradient_is_of_the_masks_that_were_sent(name, model):
    """Whatever draws: an activation and its gradient have the same mask for each example."""
    of = PrivateRelease(shape=(3,), noise=0.0, activation_clip=1e6, gradient_clip=1e6)
    (stage, params, state), _ = [
        (s, stages.select(s, p), stages.select(s, q))
        for p, q in [model.init(0)]
        for s in stages.split(model, (1,), releases={0: of})
    ]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    given = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    draw = stages.make_draw(5)._replace(noise=np.zeros(of.bits_shape(5), np.uint32))

    def sent(params):
        y, residuals, _ = stage.forward(params, state, x, draw)
        return y, residuals

    y, residuals = sent(params)
    _, gradient = stage.backward(params, residuals, given, stage.zeros(params))
    unit = stage.unit_names[0]
    path = max(params[unit], key=lambda path: ("last" in path, path))
    along = jnp.asarray(rng.normal(size=params[unit][path].shape), jnp.float32)
    moved = {**params, unit: {**params[unit], path: params[unit][path] + along}}
    expected = float(jnp.vdot(sent(moved)[0] - y, given))
    assert abs(expected) > 1e-2, (name, path)
    assert float(jnp.vdot(gradient[unit][path], along)) == pytest.approx(expected, rel=1e-3)
