"""Networks with a mask and lengths train in a run, by every method, as they do in one place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from comms import Role
from comms.link.link import Link
from pipar_jax.config import Config
from pipar_jax.data import Examples, Loader
from pipar_jax.errors import DataError
from pipar_jax.launch.api import run_here, train
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from tests.pipar_jax.runtime import support

TOKENS, LENGTH, WIDTH, CLASSES = 7, 5, 4, 3
SAMPLES, BATCH = (7, 11), 4
RTOL = 1e-9


class Reader(nnx.Module):
    """Reads sequences: attention under a mask, then an LSTM to each one's last token."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kind = {"param_dtype": jnp.float64, "rngs": rngs}
        self.embed = nnx.Embed(TOKENS, WIDTH, **kind)
        # Without biases: that of the keys has no gradient but rounding, which no other equals.
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, use_bias=False, **kind)
        self.mix = nnx.Linear(WIDTH, WIDTH, **kind)
        self.lstm = nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, **kind))
        self.head = nnx.Linear(WIDTH, CLASSES, **kind)

    def __call__(self, tokens, mask, lengths):
        x = self.attend(self.embed(tokens), mask=mask[:, None, None, :])
        x = self.lstm(nnx.tanh(self.mix(x)), seq_lengths=lengths)
        return self.head(x[jnp.arange(len(lengths)), lengths - 1])


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    example = {
        "": jnp.ones((1, LENGTH), jnp.int32),
        "mask": jnp.ones((1, LENGTH), bool),
        "lengths": jnp.ones(1, jnp.int32),
    }
    yield stages.trace(Reader, example, name="reader")
    jax.config.update("jax_enable_x64", False)


@functools.cache
def examples(samples: int, seed: int) -> Examples:
    """Random sequences of different lengths, as 64-bit and 8-bit numbers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, samples)
    mask = np.arange(LENGTH) < lengths[:, None]
    tokens = rng.integers(0, TOKENS, (samples, LENGTH)) * mask
    inputs = {"x": tokens.astype(np.uint8), "mask": mask, "lengths": lengths}
    return Examples.of(inputs, rng.integers(0, CLASSES, samples))


def pairs(samples) -> list:
    """The data as a program passes them: per device a pair, and one for the test."""
    some = [*(examples(n, i) for i, n in enumerate(samples)), examples(6, 99)]
    return [(one.inputs, one.targets["y"]) for one in some]


def setting(tmp_path, method: str, samples=SAMPLES, **values) -> Config:
    made = support.config(tmp_path, samples, method=method, batch=BATCH)
    for name, value in values.items():
        setattr(made.pipeline, name, value)
    if METHODS[method].uses_nodes:
        made.nodes.count = 2
    return made


def trained(made: Config, samples, network):
    resolved = resolve(made, models=(made.model.name,))
    data = pairs(samples)
    return load(run_here(resolved, network, data, on_event=lambda event: None), network)


def loaders(made: Config, samples) -> list[Loader]:
    return [
        Loader(examples(n, i), None, BATCH, seed=made.seed, device=i) for i, n in enumerate(samples)
    ]


#: For every method some plans; over all of them every cut is there.
CASES = {
    "fl": [{}],
    "sl": [{"cut": 2}],
    "sfl": [{"cut": 1}],
    "pipar": [{"cut": cut, "micro_batches": 3} for cut in (1, 2, 3, 4, 5)],
    "mpsl": [
        {"cuts": "1,3,5", "micro_batches": 2},
        {"cuts": "1,4", "labels": "end", "micro_batches": 2},
        {"cuts": "2,3,4", "weights": "shared", "micro_batches": 1},
    ],
    "accept": [{"cuts": "1,4", "micro_batches": 2}],
}


def chosen():
    """All of them, of which `make test` runs one of each method."""
    return [
        pytest.param(method, values, marks=[pytest.mark.soak] * (values is not CASES[method][0]))
        for method in METHODS
        for values in CASES[method]
    ]


def test_the_network_can_be_cut_on_both_sides_of_its_side_inputs(network):
    sides = {unit.name: unit.sides for unit in network.units}
    assert sides == {
        "embed": (), "attend": ("mask",), "attend_out": (), "mix": (), "lstm_cell": ("lengths",),
        "head": (),
    }  # fmt: skip


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("method", "values"), chosen())
def test_a_run_equals_centralised_training(double, network, method, values, tmp_path):
    samples = SAMPLES[1:] if METHODS[method].one_device else SAMPLES
    made = setting(tmp_path, method, samples, **values)
    run = trained(made, samples, network)
    devices = loaders(made, samples)
    if method == "sl":
        groups = [[one.batch(step)] for one in devices for step in range(one.steps_per_epoch)]
    else:  # devices with shorter epochs begin another one
        steps = max(one.steps_per_epoch for one in devices)
        groups = [[one.batch(step) for one in devices] for step in range(steps)]
    expected = support.centralised(made, network, groups)
    assert support.largest_difference(run.params, expected) < RTOL


def test_each_side_input_crosses_a_boundary_once_and_only_where_it_is_needed(
    double, network, tmp_path, monkeypatch
):
    sent: list = []
    send = Link.send

    def spying(link, tag, *args, **values):
        kept = tag.role in (Role.SIDE, Role.LABEL, Role.ACTIVATION)
        if kept and tag.device == tag.step == tag.micro_batch == 0:
            sent.append((link.peer, tag.stage, tag.role.name, tag.entry))
        return send(link, tag, *args, **values)

    monkeypatch.setattr(Link, "send", spying)
    made = setting(tmp_path, "mpsl", (7,), cuts="1,3,5", micro_batches=2)
    trained(made, (7,), network)
    lengths, mask = 0, 1  # in the order of their names
    assert sent == [
        ("n1", 1, "SIDE", lengths), ("n1", 1, "SIDE", mask), ("n1", 1, "ACTIVATION", 0),
        ("n2", 2, "SIDE", lengths), ("n2", 2, "ACTIVATION", 0),
        ("d0", 3, "ACTIVATION", 0),
    ]  # fmt: skip


def test_data_that_lack_or_add_a_side_input_are_refused_before_anything_starts(
    double, network, tmp_path
):
    made = setting(tmp_path, "pipar", cut=1)
    given = pairs(SAMPLES)
    for change, says in (
        (
            lambda x: {"x": x["x"], "mask": x["mask"]},
            "d0: the model takes the side input 'lengths'",
        ),
        (lambda x: {**x, "lengths": x["mask"]}, r"'lengths' int32\[\], but .* has bool\[5\]"),
        (lambda x: {**x, "masks": x["mask"]}, "d0: the model takes no side input 'masks'"),
        (lambda x: {key: x[key] for key in ("mask", "lengths")}, "have no 'x'"),
        (lambda x: {**x, "mask": x["mask"][:-1]}, "input mask has 6 samples, expected 7"),
        (lambda x: {**x, "": x["mask"]}, "must have 1 to 16 names"),
        (lambda x: {**x, "x": x["x"].astype(float)}, "is float64, but the model expects int32"),
    ):
        odd = [(change(given[0][0]), given[0][1]), *given[1:]]
        with pytest.raises(DataError, match=says):
            train(made, network, odd)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_predicts_with_side_inputs(double, network, tmp_path):
    run = trained(setting(tmp_path, "fl", (7,)), (7,), network)
    inputs, _ = pairs((7,))[-1]
    assert run.predict(inputs).shape == (6,)
    with pytest.raises(DataError, match="there is no 'lengths'"):
        run.predict({"x": inputs["x"], "mask": inputs["mask"]})
