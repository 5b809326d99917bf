"""Models: registration, own models, initial values, messages."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from stages.layers import Dense

# Published for ten classes, or for a thousand less the last layer's difference.
COUNTS = {
    "vgg5": 582_346,
    "vgg16": 15_253_578,
    "resnet18": 11_181_642,
    "resnet50": 25_557_032 - 990 * 2049,
    "resnet101": 44_549_160 - 990 * 2049,
    "mobilenetv3_small": 2_542_856 - 990 * 1025,
    "mobilenetv3_large": 5_483_032 - 990 * 1281,
}
# Built of the blocks of another one in the list.
DEEP = ("resnet101", "mobilenetv3_large")


def _dense(inputs, outputs):
    return lambda rngs: Dense(inputs, outputs, rngs=rngs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.soak] * (n in DEEP)) for n in COUNTS]
)
def test_parameter_counts_are_the_published_ones(name):
    model = stages.build(name, input_shape=(32, 32, 3), classes=10, stem="imagenet")
    assert stages.parameter_count(model) == COUNTS[name]


def test_a_stem_for_small_images_has_a_smaller_window():
    resnet18 = COUNTS["resnet18"]
    cifar = stages.build("resnet18", input_shape=(32, 32, 3), classes=10)
    assert stages.parameter_count(cifar) == resnet18 - (7 * 7 - 3 * 3) * 3 * 64


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_digits_models_have_at_least_four_units(name):
    assert len(stages.build(name, input_shape=(8, 8, 1), classes=10).units) >= 4


def test_unknown_names_list_the_nearest():
    with pytest.raises(stages.StageError, match="'resnet18'"):
        stages.build("resnet81", input_shape=(32, 32, 3), classes=10)
    with pytest.raises(stages.StageError, match=r"norm 'bach'.*'batch'"):
        stages.build("vgg5", input_shape=(32, 32, 3), classes=10, norm="bach")


def test_samples_of_the_wrong_shape_are_refused():
    with pytest.raises(stages.StageError, match="not tiled by 4x4"):
        stages.build("vit_small", input_shape=(30, 32, 3), classes=10)
    with pytest.raises(stages.StageError, match=r"\(height, width, channels\), got \(32, 32\)"):
        stages.build("vgg5", input_shape=(32, 32), classes=10)
    with pytest.raises(stages.StageError, match=r"\(tokens,\)"):
        stages.build("decoder_small", input_shape=(32, 32, 3), classes=10)


def test_initial_values_depend_on_seed_and_unit_name_alone():
    a = stages.Model.from_units("a", [("x", _dense(4, 4)), ("y", _dense(4, 3))], (4,), 3)
    b = stages.Model.from_units("b", [("x", _dense(4, 4)), ("z", _dense(4, 3))], (4,), 3)
    first, second = a.init(5)[0], b.init(5)[0]
    np.testing.assert_array_equal(first["x"]["kernel"], second["x"]["kernel"])
    assert not np.array_equal(first["y"]["kernel"], second["z"]["kernel"])
    assert not np.array_equal(first["x"]["kernel"], a.init(6)[0]["x"]["kernel"])


def test_sixteen_bit_models_keep_float32_weights():
    model = stages.build("cnn", input_shape=(8, 8, 1), classes=10, dtype=jnp.bfloat16)
    params, state = model.init(0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert model.shapes(3)[2].dtype == jnp.bfloat16
    assert stages.predict(model, params, state, jnp.zeros((3, 8, 8, 1))).dtype == jnp.bfloat16


class Net(nnx.Module):
    """A user's module with a list of blocks."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(6, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.head = nnx.Linear(8, 3, rngs=rngs)


def test_an_nnx_module_becomes_a_model_by_naming_its_units():
    names = ("stem", "blocks/0", "blocks/1", "head")
    model = stages.Model.from_module("net", Net, names, (6,), 3)
    assert model.unit_names == ("stem", "blocks_0", "blocks_1", "head")
    params, state = model.init(0)
    x, y = jnp.ones((4, 6)), jnp.zeros((4,), jnp.int32)
    (whole,) = stages.split(model)
    *_, after = whole.loss(params, state, x, y, stages.make_draw(8), whole.zeros(params))
    # Flax's own batch normalisation decays by samples / mini-batch too: 0.99 ** (4 / 8).
    mean = x[0] @ params["stem"]["kernel"] + params["stem"]["bias"]
    np.testing.assert_allclose(after["blocks_0"]["mean"], (1 - 0.99**0.5) * mean, rtol=1e-4)
    assert stages.predict(model, params, state, x).shape == (4, 3)


def test_a_missing_attribute_is_named():
    with pytest.raises(stages.StageError, match="no unit 'tail'"):
        stages.Model.from_module("net", Net, ("stem", "tail"), (6,), 3)


class Skip(nnx.Module):
    """A unit that hands a skip connection on beside its output."""

    def __call__(self, x):
        return x, x


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([("a", _dense(4, 5)), ("b", _dense(4, 3))], "unit 'b': cannot take float32.2, 5."),
        ([("a", lambda rngs: Skip()), ("b", _dense(4, 3))], "unit 'a'.*skip connection"),
        ([("a", _dense(4, 4)), ("a", _dense(4, 3))], "names of units repeat"),
        ([], "has no units: give at least one"),
        ([("a/b", _dense(4, 3))], "contains '/'"),
        ([("a", _dense(4, 4))], "outputs"),
        ([("a", lambda rngs: nnx.Param(jnp.ones(3)))], "expected a callable"),
    ],
)
def test_illegal_models_are_refused_by_unit(units, message):
    with pytest.raises(stages.StageError, match=message):
        stages.Model.from_units("bad", units, (4,), 3)


def test_names_load_without_jax():
    code = "import sys, stages; stages.MODELS; stages.make_draw(4); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
