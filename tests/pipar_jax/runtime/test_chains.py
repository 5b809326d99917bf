"""Chains over compute nodes: what equals what, where labels go, what a lost node does."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods import plan_for
from stages import Model
from tests.pipar_jax.runtime import support

RTOL = 1e-9
STEPS = 5
EVEN = (35, 35)
RAGGED = (17, 33)


class Layer(nnx.Module):
    """A small dense layer, so that a chain can be long and cheap."""

    def __init__(self, inputs, outputs, rngs, *, last=False):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=np.float64)
        self.last = last

    def __call__(self, x):
        y = self.linear(x.reshape(x.shape[0], -1))
        return y if self.last else nnx.tanh(y)


def layer(inputs, outputs, last=False):
    return lambda rngs: Layer(inputs, outputs, rngs, last=last)


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    widths = [64, 12, 11, 10, 9, 8]
    units = [(f"fc{i + 1}", layer(a, b)) for i, (a, b) in enumerate(zip(widths, widths[1:]))]
    units.append(("out", layer(8, 10, last=True)))
    yield Model.from_units("chain", units, support.SHAPE, support.CLASSES, input_dtype=np.float64)
    jax.config.update("jax_enable_x64", False)


def setting(tmp_path, samples, nodes, labels="home", weights="copy", in_flight=0, n=3):
    made = support.config(tmp_path, samples, method="mpsl")
    made.nodes.count, made.pipeline.labels = nodes, labels
    cuts = nodes + (labels == "home")
    made.pipeline.cuts = ",".join(str(i + 1) for i in range(cuts))
    made.pipeline.weights, made.pipeline.in_flight = weights, in_flight
    made.pipeline.micro_batches = n
    return made


def train(made, samples, network, events=None):
    made.model.name = "mlp"  # any that is known; the network is handed over
    return support.trained(made, samples, network, events)


def union(made, samples):
    loaders = support.batches(made, samples)
    return [[loader.batch(step) for loader in loaders] for step in range(STEPS)]


CASES = [
    (1, "home", "copy", 0),
    (1, "home", "shared", 0),
    (1, "home", "shared", 1),
    (2, "home", "copy", 0),
    (2, "home", "shared", 2),
    (3, "home", "shared", 0),
    (4, "home", "copy", 0),
    (4, "home", "shared", 3),
    (1, "end", "copy", 0),
    (2, "end", "shared", 1),
    (3, "end", "copy", 0),
    (4, "end", "shared", 0),
]


@pytest.mark.parametrize(("nodes", "labels", "weights", "in_flight"), CASES)
def test_a_chain_averaged_each_step_equals_sgd_on_the_union(
    double, network, nodes, labels, weights, in_flight, tmp_path
):
    made = setting(tmp_path, EVEN, nodes, labels, weights, in_flight)
    made.optimizer.momentum, made.optimizer.weight_decay = 0.9, 0.01
    run = train(made, EVEN, network)
    expected = support.centralised(made, network, union(made, EVEN), weight_decay=0.01)
    assert support.largest_difference(run.params, expected) < RTOL


@pytest.mark.parametrize("weights", ["copy", "shared"])
def test_ragged_batches_and_changing_shares_do_not_matter_to_plain_sgd(
    double, network, weights, tmp_path
):
    made = setting(tmp_path, RAGGED, 2, "home", weights)
    run = train(made, RAGGED, network)
    expected = support.centralised(made, network, union(made, RAGGED))
    assert support.largest_difference(run.params, expected) < RTOL
