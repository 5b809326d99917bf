"""Shape and dtype of every variable survive sending, averaging, moving, saving and loading."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import AggregationConfig, checkpoints
from pipar_jax.errors import ProtocolError, RunError
from pipar_jax.launch import api
from pipar_jax.roles.holdings import Holdings
from pipar_jax.runtime.unit_state import UnitState, fitted, pack
from pipar_jax.schedule.plan import OWNER, DevicePlan, Plan
from pipar_jax.training import checkpoint
from stages.variables import DTYPES, FLOATS
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support

WEIGHTS = [(dtype, ()) for dtype in sorted(FLOATS, key=str)]
WEIGHTS += [("bfloat16", (0, 3)), ("float32", (0, 3)), ("bfloat16", (3,))]
KEPT = [(dtype, ()) for dtype in sorted(DTYPES, key=str)]
KEPT += [("float16", (0, 3)), ("uint8", (0, 3)), ("int32", (3,))]
#: Two devices of two steps each.
SAMPLES = (14, 14)


class Kinds(nnx.Module):
    """A dense layer beside a weight and a statistic of each shape and dtype there is."""

    def __init__(self, inputs: int, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(inputs, 4, param_dtype=np.float64, rngs=rngs)
        self.weights = nnx.Dict(
            {f"{d}_{len(shape)}": nnx.Param(jnp.full(shape, 0.5, d)) for d, shape in WEIGHTS}
        )
        self.kept = nnx.Dict(
            {f"{d}_{len(shape)}": nnx.BatchStat(jnp.ones(shape, d)) for d, shape in KEPT}
        )
        self.key = nnx.Variable(jnp.asarray([0xFFFFFFFF, 7], jnp.uint32))  # no mean has such bits
        self.table = jnp.asarray([0.1, 0.2, 0.3])  # an attribute that is no variable
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        y = jnp.tanh(self.dense(x.reshape(x.shape[0], -1)))
        for weight in self.weights.values():
            y = y + jnp.sum(weight[...].astype(y.dtype)) * jnp.mean(y)
        for one in self.kept.values():
            value = one[...]
            one.set_value(~value if value.dtype == bool else value + jnp.asarray(1, value.dtype))
        self.seen.set_value(self.seen[...] + 1)
        return y * jnp.sum(self.table)


class Statistics(nnx.Module):
    """A unit that has statistics and no weights."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.mean = nnx.BatchStat(jnp.zeros((4,)))

    def __call__(self, x):
        self.mean.set_value(self.mean[...] + jnp.mean(x, axis=0))
        return x


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    units = [
        ("a", lambda rngs: Kinds(64, rngs)),
        ("b", lambda rngs: Kinds(4, rngs)),
        ("only", Statistics),
        ("out", lambda rngs: nnx.Linear(4, 10, param_dtype=np.float64, rngs=rngs)),
    ]
    yield stages.Model.from_units(
        "kinds", units, support.SHAPE, support.CLASSES, input_dtype=np.float64
    )
    jax.config.update("jax_enable_x64", False)


def check(model, params, state, steps):
    """Checks all variables against the model, and the values of those that have no mean."""
    for unit in model.units:
        for found, wanted in ((params, unit.params), (state, unit.state)):
            got = {path: (a.shape, a.dtype) for path, a in found.get(unit.name, {}).items()}
            assert got == {path: (one.shape, one.dtype) for path, one in wanted.items()}
    for name in ("a", "b"):
        np.testing.assert_array_equal(state[name]["key"], [0xFFFFFFFF, 7])
        np.testing.assert_array_equal(state[name]["table"], [0.1, 0.2, 0.3])
        assert int(state[name]["seen"]) == steps
        assert int(state[name]["kept/int8_0"]) == 1 + steps
        assert bool(state[name]["kept/bool_0"]) == (steps % 2 == 0)
        for dtype in FLOATS:  # trained, not only kept
            assert np.all(np.asarray(params[name][f"weights/{dtype}_0"]) != 0.5)
    assert np.any(np.asarray(state["only"]["mean"]) != 0.0)


def setting(folder, method, **values):
    made = support.config(folder, SAMPLES, method=method)
    made.optimizer.momentum, made.run.evaluate_every = 0.9, 1
    for name, value in values.items():
        setattr(made.pipeline, name, value)
    return made


def follow(monkeypatch, *plans):
    """Lets a run follow plans, one for each round."""
    monkeypatch.setattr(api, "run_server", functools.partial(api.run_server, script=plans))


def chain(cuts, *hosts):
    return Plan((DevicePlan(cuts, (OWNER, *hosts), 1),) * 2, aggregate_every=1)


def test_sent_and_averaged(double, network, tmp_path):
    made = setting(tmp_path, "fl")
    run = support.trained(made, SAMPLES, network)
    check(network, run.params, run.state, steps=2)
    assert run.outputs(np.zeros((2, *support.SHAPE))).shape == (2, 10)


@pytest.mark.soak
@pytest.mark.parametrize("codec", ["bfloat16", "float16", "fp8", "int8", "int4"])
def test_sent_coded(double, network, codec, tmp_path):
    made = setting(tmp_path, "fl")
    made.aggregation.codec = codec
    run = support.trained(made, SAMPLES, network)
    for unit in network.units:
        for found, wanted in ((run.params, unit.params), (run.state, unit.state)):
            for path, one in wanted.items():
                got = found[unit.name][path]
                assert (got.shape, got.dtype) == (one.shape, one.dtype), path
    np.testing.assert_array_equal(run.state["a"]["key"], [0xFFFFFFFF, 7])


def test_handed_on(double, network, tmp_path):
    run = support.trained(setting(tmp_path, "sl", cut=2), SAMPLES, network)
    check(network, run.params, run.state, steps=4)


def test_moved_by_a_change_of_plan(double, network, monkeypatch, tmp_path):
    """Nodes average where they are, give a unit away with its optimiser state, and are asked."""
    follow(monkeypatch, chain((1, 3), "n1", "n2"), chain((1, 3), "n2", "n1"))
    made = setting(tmp_path, "mpsl", cuts="1,3", labels="end", micro_batches=1)
    made.nodes.count = 2
    run = support.trained(made, SAMPLES, network)
    check(network, run.params, run.state, steps=2)


def _load(path, network):
    return checkpoint.sort_tensors(checkpoint.read_tensors(path), network, path)


def test_saved_and_loaded(double, network, tmp_path):
    params, state = network.init(0)
    path = tmp_path / checkpoints.WEIGHTS
    checkpoint.save(path, params, state, {})
    for found, wanted in zip(_load(path, network), (params, state), strict=True):
        for unit, arrays in wanted.items():
            for name, array in arrays.items():
                got = found[unit][name]
                assert (got.shape, got.dtype) == (array.shape, array.dtype)
                np.testing.assert_array_equal(got, np.asarray(array))


def test_weights_of_another_dtype_are_refused(double, tmp_path):
    def model(dtype):
        unit = ("a", lambda rngs: nnx.Linear(2, 3, param_dtype=dtype, rngs=rngs))
        return stages.Model.from_units("one", [unit], (2,), 3, input_dtype=dtype)

    path = tmp_path / checkpoints.WEIGHTS
    checkpoint.save(path, *model("float16").init(0), {})
    with pytest.raises(RunError, match=r"a/bias is float16\[3\].*expects float64\[3\]"):
        _load(path, model("float64"))


def test_states_of_units_cross_a_link(double, network):
    """What one host gives is what another takes, and optimiser states of another kind are not."""
    params, state = network.init(0)
    made = setting("nowhere", "pipar", cut=2)
    given = {(3, unit): UnitState(params[unit], state[unit]) for unit in params}
    wanted = {key: ("params", "state") for key in given}
    arrived = fakes.bundle(None, "trained", {"type": "trained"}, pack(given))
    found = Holdings(network, made).states(arrived, wanted, "d0")
    assert found[3, "only"].params == {} and found[3, "out"].state == {}
    for key, one in given.items():
        for part in ("params", "state"):
            for path, array in getattr(one, part).items():
                got = getattr(found[key], part)[path]
                assert (got.shape, got.dtype) == (array.shape, array.dtype)
                np.testing.assert_array_equal(got, np.asarray(array))
    like = {"trace": jnp.zeros((), jnp.bfloat16)}
    assert fitted({"0": np.zeros((), jnp.bfloat16)}, like, "d0")["trace"].shape == ()
    for wrong in (np.zeros(1, jnp.bfloat16), np.zeros((), np.float32)):
        with pytest.raises(RunError, match=r"expected \['bfloat16\[\]'\]"):
            fitted({"0": wrong}, like, "d0")


def test_a_state_in_another_dtype_than_this_host_has_is_refused(double, network):
    """Averages rely on equal dtypes: a member must not be able to end the run with another one."""
    params, state = network.init(0)
    given = {(3, unit): UnitState(params[unit], state[unit]) for unit in params}
    wanted = {key: ("params", "state") for key in given}
    held = Holdings(network, setting("nowhere", "pipar", cut=2))
    honest = {name: np.asarray(array) for name, array in pack(given).items()}
    dtypes = [*map(np.dtype, "?bBhHiIlLefdF"), np.dtype(jnp.bfloat16)]
    refused = 0
    for name, array in honest.items():
        for dtype in dtypes:
            said = fakes.bundle(None, "trained", {"type": "trained"}, honest | {
                name: np.zeros(array.shape, dtype)
            })  # fmt: skip
            if dtype == array.dtype:
                held.states(said, wanted, "d0")
                continue
            with pytest.raises(ProtocolError, match=re.escape(f"expected {array.dtype}[")):
                held.states(said, wanted, "d0")
            refused += 1
    assert refused >= len(honest) * (len(dtypes) - 1)


def test_an_average_keeps_what_is_equal_and_takes_the_first_of_what_has_no_mean():
    def state(number):
        return {"unit": {
            "table": jnp.asarray([0.1, 0.7, 1e-30]), "count": jnp.asarray(number, jnp.int32),
            "half": jnp.asarray([number], jnp.bfloat16),
        }}  # fmt: skip

    weights = {"unit": {"w": jnp.ones((), jnp.float16)}}
    average = Aggregator(AggregationConfig(), dict(weights), state(0))
    average.aggregate([Contribution(weights, state(i), float(i)) for i in (3, 5, 9)])
    found = average.state["unit"]
    np.testing.assert_array_equal(found["table"], state(0)["unit"]["table"])
    assert int(found["count"]) == 3
    assert found["half"].dtype == jnp.bfloat16 and abs(float(found["half"][0]) - 115 / 17) < 0.02
    assert average.params["unit"]["w"].dtype == jnp.float16
