"""What a unit's module may keep, and what is refused when the model is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages


class Mean(nnx.Variable):
    """A type of variable of a user's own."""


class Frozen(nnx.Module):
    """Keeps variables of many kinds beside what is trained, and calls a function on itself."""

    def __init__(self, rngs: nnx.Rngs, call=lambda self: None, **kept) -> None:
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.call = call
        for name, value in kept.items():
            setattr(self, name, value() if callable(value) else value)

    def __call__(self, x):
        self.call(self)
        return self.linear(x)


def model(call=lambda self: None, **kept) -> stages.Model:
    units = [("a", lambda rngs: Frozen(rngs, call, **kept))]
    return stages.Model.from_units("own", units, (3,), 3)


def trained(made, state, **draw):
    """State after a call in training."""
    params, _ = made.init(0)
    x, scalars = jnp.ones((2, 3)), stages.make_draw(2, **draw)
    return made.units[0].call(params["a"], state["a"], x, {}, draw=scalars, train=True)[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_is_no_param_is_state():
    def call(self):
        self.mean.set_value(self.mean[...] * 2)
        self.count.set_value(self.count[...] + 1)
        self.plain = self.plain + 1.5
        self.number.set_value(0.25)
        self.half.set_value(self.half[...] * jnp.float32(0.5))
        self.sow(nnx.Intermediate, "seen", self.mean[...])

    made = model(
        call,
        mean=lambda: Mean(jnp.ones(2)),
        count=lambda: nnx.Variable(jnp.zeros((), jnp.int32)),
        plain=lambda: jnp.ones(3),
        table=np.arange(3),
        number=lambda: nnx.Variable(0.5),
        half=lambda: nnx.BatchStat(jnp.ones((), jnp.bfloat16)),
        nested=lambda: nnx.data({("x", "y"): jnp.ones(1)}),
    )
    _, state = made.init(0)
    assert {path: str(one.dtype) for path, one in state["a"].items()} == {
        "mean": "float32", "count": "int32", "plain": "float32", "table": "int32",
        "number": "float32", "half": "bfloat16", "nested/x/y": "float32",
    }  # fmt: skip
    after = trained(made, state)
    assert {path: str(one.dtype) for path, one in after.items()} == {
        path: str(one.dtype) for path, one in state["a"].items()
    }
    assert float(after["mean"][0]) == 2.0 and int(after["count"]) == 1
    assert float(after["plain"][0]) == 2.5 and float(after["number"]) == 0.25
    assert float(after["half"]) == 0.5


def _new(self):
    self.new = nnx.BatchStat(jnp.ones(1))


@pytest.mark.parametrize(
    ("kept", "call", "message"),
    [
        ({"w": lambda: nnx.Param(jnp.ones(2, jnp.int32))}, None, "'w' of type Param has dtype int"),
        ({"v": lambda: Mean(jnp.ones(2, jnp.complex64))}, None, "'v' of type Mean has dtype compl"),
        ({"v": lambda: Mean((jnp.ones(2), jnp.ones(1)))}, None, "type Mean contains a tuple"),
        ({"v": lambda: Mean(jax.random.key(0))}, None, "'v' of type Mean is a random key.*Rngs"),
        ({"v": lambda: nnx.Cache(jnp.ones(2))}, None, "'v' of type Cache.*decode=False"),
        ({"v": lambda: [jnp.ones(2)]}, None, "attribute 'v' contains arrays in a list.*nnx.List"),
        ({}, lambda self: self.linear.bias.set_value(jnp.ones(3)), "'linear/bias' .Param.*Batch"),
        ({}, _new, "creates the variable 'new' .BatchStat.*in __init__"),
        ({"v": lambda: Mean(jnp.ones(2))}, lambda self: self.v.set_value(jnp.ones(3)),
         "changes the variable 'v' to float32.3., expected float32.2."),
        ({"v": lambda: Mean(jnp.ones((), jnp.int32))}, lambda self: self.v.set_value(0.5),
         "changes the variable 'v' to float32.*, expected int32"),
        ({}, lambda self: {}["missing"], "unit 'a': cannot take float32.*KeyError: 'missing'"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(kept, call, message):
    with pytest.raises(stages.StageError, match=message):
        model(call or (lambda self: None), **kept)


def test_an_error_of_a_factory_names_the_unit():
    def factory(rngs):
        raise RuntimeError("no such\nfile")

    with pytest.raises(stages.StageError, match=r"unit 'a': its factory failed: .*: no such file"):
        stages.Model.from_units("own", [("a", factory)], (3,), 3)


class Noise(nnx.Module):
    """Records what its random streams draw."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rngs = nnx.Rngs(noise=1, other=2)
        self.drawn = nnx.BatchStat(jnp.zeros((3,)))

    def __call__(self, x):
        keys = self.rngs.noise(), self.rngs.noise(), self.rngs.other()
        self.drawn.set_value(jnp.stack([jax.random.uniform(key) for key in keys]))
        return x


def test_random_streams_belong_to_device_step_and_position():
    units = [("a", Noise), ("b", Noise)]
    made = stages.Model.from_units("noise", units, (3,), 3)
    params, state = made.init(0)
    assert set(state["a"]) == {"drawn"}

    def drawn(unit=0, **draw):
        one, x = made.units[unit], jnp.ones((2, 3))
        scalars = stages.make_draw(4, **draw)
        _, after = one.call(params[one.name], state[one.name], x, {}, draw=scalars, train=True)
        return tuple(np.asarray(after["drawn"]).tolist())

    base = drawn()
    assert base == drawn() and len(set(base)) == 3
    changes = ({"seed": 1}, {"device": 1}, {"step": 1}, {"position": 2}, {"unit": 1})
    others = [drawn(**change) for change in changes]
    assert len({base, *others}) == 1 + len(changes)
