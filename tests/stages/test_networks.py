"""Every registered network, cut into stages, equals itself uncut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from tests.stages.support import assert_close, batch, step

IMAGES = tuple(
    name for name in stages.MODELS if name not in ("mlp", "cnn", "vgg5", "decoder_small", "gpt2")
)
# Compiling these takes long.
SLOW = ("vgg16", "vgg19", "resnet50", "resnet101", "mobilenetv3_large")
# A network of their family, or with their layers, is tested as well: `make soak` tests them too.
LARGE = (
    "vgg8",
    "vgg11",
    "vgg16",
    "vgg19",
    "resnet50",
    "resnet101",
    "mobilenetv3_small",
    "mobilenetv3_large",
)


def _cuts(model: stages.Model) -> tuple[int, ...]:
    count = len(model.units)
    return (1, count // 2, count - 1)


def _check(model: stages.Model, cuts: tuple[int, ...]) -> None:
    params, state = model.init(0)
    x, y = batch(model, 2)

    def run(cuts: tuple[int, ...]):
        with jax.default_matmul_precision("highest"):
            return step(model, cuts, params, state, x, y)

    with ThreadPoolExecutor(2) as pool:  # most of the time is the compiler's
        whole, split = pool.map(run, ((), cuts))
    # Batch norm over few pixels amplifies rounding: group norm keeps the test sharp.
    assert_close(split, whole, 2e-3, 1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.soak] * (n in LARGE)) for n in IMAGES]
)
def test_cut_networks_equal_the_whole(name):
    model = stages.build(name, input_shape=(8, 8, 3), classes=10, norm="group")
    _check(model, _cuts(model))


@pytest.mark.soak
@pytest.mark.parametrize("name", IMAGES)
def test_every_cut_at_once_equals_the_whole(name):
    model = stages.build(name, input_shape=(32, 32, 3), classes=10, norm="group")
    _check(model, tuple(range(1, len(model.units))))


# Each cut of a deep network compiles all of it again: an hour for ResNet-101's 34.
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in IMAGES if name not in SLOW])
def test_every_cut_by_itself_equals_the_whole(name):
    model = stages.build(name, input_shape=(32, 32, 3), classes=10, norm="group")
    for cut in range(1, len(model.units)):
        _check(model, (cut,))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cuts", [(), (1, 3, 5)])
def test_the_decoder_trains_on_tokens(cuts):
    model = stages.build("decoder_small", input_shape=(12,), classes=30, dropout=0.1)
    params, state = model.init(0)
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 30, (4, 13)), jnp.int32)
    x, y = tokens[:, :-1], tokens[:, 1:]
    parts = stages.split(model, cuts)
    own = [stages.select(part, params) for part in parts]
    stats = [stages.select(part, state) for part in parts]
    sums = [part.zeros(variables) for part, variables in zip(parts, own, strict=True)]
    draw, kept, h = stages.make_draw(4), [], x
    for i, part in enumerate(parts[:-1]):
        h, residuals, _ = part.forward(own[i], stats[i], h, draw)
        kept.append(residuals)
    metrics, cotangent, sums[-1], _ = parts[-1].loss(own[-1], stats[-1], h, y, draw, sums[-1])
    for i in reversed(range(len(parts) - 1)):
        cotangent, sums[i] = parts[i].backward(own[i], kept[i], cotangent, sums[i])
    assert not parts[1:] or cotangent.shape == ()  # tokens have no cotangent
    np.testing.assert_allclose(metrics["loss"] / 4, np.log(30), rtol=0.1)
    (whole,) = stages.split(model)
    _, _, expected, _ = whole.loss(params, state, x, y, draw, whole.zeros(params))
    assert_close(stages.join(sums), expected, 1e-4, 1e-7)


def test_the_decoder_does_not_look_ahead():
    model = stages.build("decoder_small", input_shape=(8,), classes=20)
    params, state = model.init(0)
    x = jnp.arange(8, dtype=jnp.int32)[None]
    changed = x.at[0, 5].set(17)
    a, b = (stages.predict(model, params, state, tokens) for tokens in (x, changed))
    np.testing.assert_allclose(a[0, :5], b[0, :5], atol=1e-6)
    assert not np.allclose(a[0, 5:], b[0, 5:], atol=1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["vgg19", "resnet50", "mobilenetv3_large", "vit_small"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1)])
def test_networks_take_both_kinds_of_images(name, shape):
    model = stages.build(name, input_shape=shape, classes=10)
    assert model.shapes(3)[-1].shape == (3, 10)


def test_stems_differ_in_resolution():
    for name in ("resnet18", "mobilenetv3_small"):
        small, wide = (
            stages.build(name, input_shape=(32, 32, 3), classes=10, stem=stem).shapes(1)[1].shape
            for stem in ("cifar", "imagenet")
        )
        assert small[1] == 32
        assert wide[1] in (8, 16)
