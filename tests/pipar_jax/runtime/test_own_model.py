"""The user's own network by ``module:NAME:FUNCTION``, and traced networks in runs."""

from __future__ import annotations

import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stages
from pipar_jax.config import plugins
from pipar_jax.errors import ConfigError, DataError, PiparError
from pipar_jax.launch.api import train
from pipar_jax.methods.resolution import resolve
from pipar_jax.runtime.setup import build_model
from stages.signature import Signature
from tests.pipar_jax.runtime import support

MODULE = """
import jax.numpy as jnp
import stages
from flax import linen, nnx

class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.one = nnx.Linear(64, width, rngs=rngs)
        self.two = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x.reshape(x.shape[0], -1))))

class Bare(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(self.width)(x.reshape(x.shape[0], -1)))
        return linen.Dense(10)(x)

def factory(width=3):
    return lambda rngs: Net(width, rngs)

def module(width=3):
    return Net(width, nnx.Rngs(0))

def bare(width=3, **_):
    return Bare(width)

def plain(width=3):
    def run(params, x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ params["a"]) @ params["b"]
    return run, {"a": jnp.ones((64, width)), "b": jnp.ones((width, 10))}

def model(input_shape, classes, width=3):
    return stages.trace(factory(width), jnp.ones((1, *input_shape)), classes=classes)

def sided():
    def run(params, x, mask):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ params["a"]) * mask[:, :1] @ params["b"]
    example = {"x": jnp.ones((1, 8, 8, 1)), "mask": jnp.ones((1, 3))}
    return stages.trace(run, example, params=plain()[1])

def fails():
    raise ValueError("no such width")

def nothing():
    return None
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("brought", None)


def configured(tmp_path, function: str, args: str = "", **values):
    made = support.config(tmp_path, (14, 14), name=f"module:brought:{function}", **values)
    made.model.args = args
    return made


@pytest.mark.parametrize("function", ["factory", "module", "bare", "plain", "model"])
def test_a_function_returns_a_model_or_whatever_can_be_traced(function, tmp_path):
    made = configured(tmp_path, function, "width=5", dtype="float32")
    model = build_model(made, Signature.labelled(support.SHAPE, support.CLASSES))
    assert len(model.units) == 2 and model.shapes(4)[1].shape == (4, 5)
    assert model.recipe is None  # who loads the run says whose code is to be run


@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        ("factory", "wide=5", r"model\.args='wide=5': .* has no parameter 'wide' \(known: width\)"),
        ("fails", "", r"own network module:brought:fails failed: ValueError: no such width \(.*:"),
        ("gone", "", "has no function 'gone'"),
        ("nothing", "", "model 'nothing' is a NoneType, expected an NNX or Linen module"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(function, args, says, tmp_path):
    made = configured(tmp_path, function, args, dtype="float32")
    with pytest.raises((PiparError, stages.StageError), match=says) as caught:
        build_model(made, Signature.labelled(support.SHAPE, support.CLASSES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("module:brought", "", r"model\.name='module:brought' is not a network.*module:NAME:FUNC"),
        ("vgg5", "width=3", "is for a function of your own: set model.name=module:NAME:FUNCTION"),
        ("module:brought:net", "width", "'width' is not NAME=VALUE; write 'width=16 norm=group'"),
        ("module:brought:net", "a='b", "cannot be read: No closing quotation"),
    ],
)
def test_names_and_arguments_are_checked_before_anything_starts(name, args, says, tmp_path):
    made = support.config(tmp_path, (14,), name=name)
    made.model.args = args
    with pytest.raises(ConfigError, match=says):
        resolve(made)


def test_arguments_are_numbers_lists_and_texts():
    text = "a=1 b=0.5 c=true d=[1,2] e=group f='two words'"
    found = {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "group", "f": "two words"}
    assert plugins.read_args(text) == found


def test_data_without_a_side_input_of_the_model_are_refused_before_anything_starts(tmp_path):
    import brought

    made = support.config(tmp_path, (14,), dtype="float32")
    with pytest.raises(DataError, match="takes the side input 'mask' float32"):
        train(made, brought.sided(), support.datasets((14,)))


class Skips(nnx.Module):
    """A network that no row of modules is: a connection across, in float64."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def layer(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=np.float64)

        self.enter, self.wide, self.narrow = layer(64, 6), layer(6, 6), layer(6, 6)
        self.leave = layer(6, 10)

    def __call__(self, x):
        x = nnx.tanh(self.enter(x.reshape(x.shape[0], -1)))
        return self.leave(x + nnx.tanh(self.narrow(nnx.tanh(self.wide(x)))))


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("method", ["pipar", "fl", "sfl"])
def test_a_traced_network_trains_as_plain_sgd_does(double, method, tmp_path):
    samples, steps = (17, 33), 5
    network = stages.trace(Skips, jnp.ones((1, *support.SHAPE)))
    assert network.unit_names == ("enter", "wide_narrow", "leave")
    made = support.config(tmp_path, samples, method=method)
    made.pipeline.cut = 2
    made.pipeline.micro_batches = 3 if method == "pipar" else 1
    run = support.trained(made, samples, network)
    loaders = support.batches(made, samples)
    groups = [[loader.batch(step) for loader in loaders] for step in range(steps)]
    expected = support.centralised(made, network, groups)
    assert support.largest_difference(run.params, expected) < 1e-9


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("method", ["pipar", "fl"])
def test_frozen_weights_stay_and_the_others_are_trained(double, method, tmp_path):
    """As plain SGD on the trained ones; what is saved is the whole network."""
    samples, steps = (17, 33), 5
    network = stages.trace(Skips, jnp.ones((1, *support.SHAPE)))
    made = support.config(tmp_path, samples, method=method)
    made.pipeline.cut, made.model.trainable = 1, "/wide/|leave/bias"
    made.pipeline.micro_batches = 3 if method == "pipar" else 1
    run = support.trained(made, samples, network.training(made.model.trainable, made.seed))
    loaders = support.batches(made, samples)
    groups = [[loader.batch(step) for loader in loaders] for step in range(steps)]
    mask = {
        unit.name: {path: "wide" in path or f"{unit.name}/{path}" == "leave/bias"
                    for path in unit.params}
        for unit in network.units
    }  # fmt: skip
    rest = {unit: {path: not one for path, one in paths.items()} for unit, paths in mask.items()}
    tx = optax.chain(optax.sgd(0.05), optax.masked(optax.set_to_zero(), rest))
    expected = support.centralised(made, network, groups, tx)
    for unit, arrays in expected.items():
        for path, array in arrays.items():
            np.testing.assert_allclose(run.params[unit][path], array, rtol=1e-9, atol=1e-12)
    before, _ = network.init(made.seed)
    np.testing.assert_array_equal(run.params["enter"]["kernel"], before["enter"]["kernel"])
    assert not np.array_equal(
        run.params["wide_narrow"]["wide/kernel"], before["wide_narrow"]["wide/kernel"]
    )


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    made = configured(tmp_path, "factory", dtype="float32")
    made.model.trainable = "lora"
    with pytest.raises(stages.StageError, match="no weight matches 'lora'"):
        build_model(made, Signature.labelled(support.SHAPE, support.CLASSES))
    made.model.trainable = "("
    with pytest.raises(ConfigError, match=r"model\.trainable='\(' is not a regular expression"):
        resolve(made)
