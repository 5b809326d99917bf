"""Weights that are shared inside a unit are one; between units they are refused by name."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from tests.stages.support import step


class Uses(nnx.Module):
    """Calls layers that it is given."""

    def __init__(self, *layers) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scaled(nnx.Module):
    """Multiplies by a variable that it is given."""

    def __init__(self, scale) -> None:
        self.scale = scale

    def __call__(self, x):
        return x * self.scale[...]


class Tied(nnx.Module):
    """A network whose first and last piece have one layer, and whose scales are one variable."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        layer = nnx.Linear(3, 3, rngs=rngs)
        scale = nnx.Param(jnp.ones(3))
        self.encoder = Uses(layer, nnx.Linear(3, 3, rngs=rngs))
        self.decoder = Uses(layer)
        self.one, self.two = Scaled(scale), Scaled(scale)
        self.counted = Scaled(nnx.BatchStat(jnp.ones(3)))
        self.again = Scaled(self.counted.scale)
        self.dropped = nnx.Dropout(0.5, rngs=rngs)
        self.streams = nnx.Sequential(self.dropped, lambda x: x)


LAYER = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
SCALE = nnx.Param(jnp.ones(3))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("encoder", "decoder", "'encoder' and 'decoder' share a module of type Linear: "
         "encoder/layers/0 is decoder/layers/0"),
        ("one", "two", "'one' and 'two' share a variable of type Param: one/scale is two/scale"),
        ("counted", "again", "share a variable of type BatchStat"),
        ("encoder", "encoder/layers/1", "share a module of type Linear: encoder/layers/1 is enc"),
    ],
)  # fmt: skip
def test_what_two_attributes_share_is_refused(first, second, message):
    with pytest.raises(stages.StageError, match=f"{message}.*put all its users into one unit"):
        stages.Model.from_module("tied", Tied, (first, second), (3,), 3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (lambda rngs: LAYER, lambda rngs: LAYER, "'a' and 'b' share a module.*: a is b"),
        (lambda rngs: Uses(LAYER), lambda rngs: LAYER, "a/layers/0 is b"),
        (lambda rngs: Scaled(SCALE), lambda rngs: Uses(Scaled(SCALE)),
         "share a variable of type Param: a/scale is b/layers/0/scale"),
    ],
)  # fmt: skip
def test_what_two_factories_share_is_refused(first, second, message):
    with pytest.raises(stages.StageError, match=message):
        stages.Model.from_units("tied", [("a", first), ("b", second)], (3,), 3)


def test_random_streams_may_be_shared():
    assert stages.Model.from_module("net", Tied, ("dropped", "streams"), (3,), 3).unit_names


def test_what_a_unit_shares_with_itself_is_one_variable():
    """It has the gradient of both of its uses, as Flax counts and trains it."""

    def unit(rngs):
        layer = nnx.Linear(3, 3, rngs=rngs)
        return Uses(layer, layer)

    model = stages.Model.from_units("net", [("a", unit), ("b", unit)], (3,), 3)
    assert stages.parameter_count(model) == 2 * 12
    params, state = model.init(0)
    assert set(params["a"]) == {"layers/0/bias", "layers/0/kernel"}
    x, labels = jnp.ones((2, 3)), jnp.asarray([0, 1])
    _, gradient, _ = step(model, (1,), params, state, x, labels)
    moved, far = {unit: dict(arrays) for unit, arrays in params.items()}, 1e-2
    losses = []
    for sign in (-1, 1):
        moved["a"]["layers/0/bias"] = params["a"]["layers/0/bias"].at[0].add(sign * far)
        losses.append(step(model, (), moved, state, x, labels)[0]["loss"] / 2)
    slope = (losses[1] - losses[0]) / (2 * far)
    np.testing.assert_allclose(gradient["a"]["layers/0/bias"][0], slope, rtol=1e-2)
