"""Evaluation on the devices' own test data: what is reported, and what cannot be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipar_jax.data import Examples
from pipar_jax.errors import ConfigError, DataError
from pipar_jax.launch.api import train
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.evaluation import Evaluator
from tests.pipar_jax.runtime import support

SAMPLES, TESTS = (14, 20), (5, 11)


def with_tests() -> list:
    """Data of two devices with test data of their own, and the server's test set."""
    own = [support.dataset(n, i, test=TESTS[i]) for i, n in enumerate(SAMPLES)]
    return [*own, support.dataset(0, 99, test=16)]


def setting(tmp_path, on: str, method: str):
    made = support.config(tmp_path, SAMPLES, name="mlp", dtype="float32", method=method)
    made.run.evaluate_on, made.run.evaluate_every, made.aggregation.every = on, 1, "epoch"
    made.epochs = 2
    return made


def evaluations(events):
    return [one for one in events if one["event"] == "evaluated"]


@pytest.mark.parametrize(("method", "on"), [("fl", "both"), ("pipar", "devices")])
def test_devices_score_the_network_on_their_own_data(tmp_path, method, on):
    network, data, events = support.model("mlp", "float32"), with_tests(), []
    made = setting(tmp_path, on, method)
    made.stop.metric, made.stop.target = "loss", 1e9  # stops the run after its first round
    run = train(made, network, data, on_event=events.append)
    (last,) = evaluations(events)
    totals = [Evaluator(run.model, one, "float32").sums(run.params, run.state) for one in data[:-1]]
    for device, expected in enumerate(totals):
        row = last["devices"][str(device)]
        assert row["samples"] == TESTS[device] == expected.samples
        assert row["loss"] == pytest.approx(expected.loss / expected.samples, rel=1e-6)
        value, weight = expected.metrics["accuracy"]
        assert row["metrics"] == {"accuracy": pytest.approx(value / weight)}
    union = totals[0].plus(totals[1])
    overall = last["on_devices"]
    assert overall["loss"] == pytest.approx(union.loss / sum(TESTS), rel=1e-6)
    assert overall["metrics"]["accuracy"] == pytest.approx(union.metrics["accuracy"][0] / 16)
    of_server = Evaluator(run.model, data[-1], "float32").evaluate(run.params, run.state)
    counts = of_server.loss if on == "both" else overall["loss"]
    assert last["loss"] == pytest.approx(counts, rel=1e-6)
    assert run.score("loss") == last["loss"]


def test_evaluating_on_devices_changes_no_weight(tmp_path):
    network = support.model("mlp", "float32")
    runs = [
        train(setting(tmp_path / on, on, "pipar"), network, with_tests())
        for on in ("server", "devices")
    ]
    assert support.largest_difference(runs[0].params, runs[1].params) == 0.0


def test_without_test_data_of_their_own_devices_are_refused(tmp_path):
    made = setting(tmp_path, "devices", "fl")
    network, data = support.model("mlp", "float32"), with_tests()
    pair = data[0].train.x, data[0].train.labels
    with pytest.raises(DataError, match=r"d0: .*pass a pipar_jax.data.Dataset with both splits"):
        train(made, network, [pair, *data[1:]])
    empty = dataclasses.replace(data[0], test=data[0].test.empty())
    with pytest.raises(DataError, match="d0: 'test': there is no sample to test with"):
        train(made, network, [empty, *data[1:]])
    other = Examples.of(np.zeros((3, 8, 9, 1), np.float32), np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"d0: test samples are float32.*but training samples"):
        train(made, network, [dataclasses.replace(data[0], test=other), *data[1:]])
    made.data.source = "digits"
    with pytest.raises(DataError, match="one test set, which the server evaluates"):
        train(made, network)
    made.privacy.epsilon = 8.0
    with pytest.raises(ConfigError, match=r"run.evaluate_on='devices' sends scores"):
        resolve(made)
