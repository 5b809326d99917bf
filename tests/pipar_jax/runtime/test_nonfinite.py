"""What is not finite is an event and, unless told otherwise, ends the run, in every method."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.errors import RunError
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol.messages import NonFinite
from pipar_jax.report import make_page, read_run
from pipar_jax.report.run_state import RunState, describe
from pipar_jax.report.sinks import scalars
from pipar_jax.runtime import finite
from tests.experiments.running import Binary
from tests.pipar_jax.runtime import support

BATCH = 6
#: With gradients above 1 a single step leaves infinities in float32, while its loss is finite.
TOO_FAST = 3e38


def setting(method, folder, *, steps=1, weights="copy", **values):
    samples = (BATCH * steps,) * (1 if METHODS[method].one_device else 2)
    made = support.config(folder, samples, dtype="float32", method=method, batch=BATCH)
    made.pipeline.cut, made.pipeline.micro_batches, made.pipeline.weights = 1, 2, weights
    if METHODS[method].uses_nodes:
        made.nodes.count, made.pipeline.cuts = (
            (1, "1,2") if METHODS[method].labels_home else (2, "1,2")
        )
    for path, value in values.items():
        group, _, name = path.partition("__")
        setattr(getattr(made, group), name, value)
    return made, samples


def trained(made, samples, network, events=None):
    """Trains on bright images, so that gradients are above 1."""
    data = support.datasets(samples)
    for i, one in enumerate(data):
        train = dataclasses.replace(one.train, inputs={"x": one.train.x * np.float32(1e3)})
        data[i] = dataclasses.replace(one, train=train)
    tell = (lambda event: None) if events is None else events.append
    return load(
        run_here(resolve(made, models=(made.model.name,)), network, data, on_event=tell), network
    )


def strictly(folder):
    """Reads a run's events as a reader would that knows no NaN."""

    def refuse(text):
        raise AssertionError(f"a bare {text}")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


WAYS = [(method, "copy") for method in METHODS] + [("mpsl", "shared")]


@pytest.mark.parametrize(("method", "weights"), WAYS)
def test_weights_that_are_not_finite_end_the_run(method, weights, tmp_path):
    made, samples = setting(method, tmp_path, weights=weights, optimizer__learning_rate=TOO_FAST)
    network, events = support.model(dtype="float32"), []
    line = r"(device \d|all devices), round 0, step 0: after it the weights of fc\d.* not finite"
    with pytest.raises(RunError, match=line):
        trained(made, samples, network, events)
    (first, *_) = [event for event in events if event["event"] == "nonfinite"]
    assert first["what"] == "weights" and first["round"] == first["step"] == 0 and first["units"]
    assert not list(tmp_path.rglob("weights.safetensors"))
    strictly(next(tmp_path.rglob("metrics.jsonl")).parent)


#: A coordinator that averages, a part that is handed on, nodes that average among themselves.
KINDS = [("pipar", "copy"), ("sl", "copy"), ("mpsl", "shared")]


@pytest.mark.parametrize(
    ("method", "weights"),
    [pytest.param(*one, marks=[pytest.mark.soak] * (one not in KINDS)) for one in WAYS],
)
def test_a_run_may_go_on_and_tells_of_each_loss_average_and_weights(method, weights, tmp_path):
    made, samples = setting(
        method, tmp_path, steps=2, weights=weights, optimizer__learning_rate=TOO_FAST,
        run__nonfinite="ignore", run__evaluate_every=1,
    )  # fmt: skip
    network, events = support.model(dtype="float32"), []
    run = trained(made, samples, network, events)
    told = [event for event in strictly(run.folder) if event["event"] == "nonfinite"]
    whats = {(event["what"], event["device"]) for event in told}
    for device in range(len(samples)):
        assert ("loss", device) in whats  # of the second step, wherever the last stage is
    assert {"weights", "average"} - {"average" if method == "sl" else ""} <= {w for w, _ in whats}
    if weights == "shared" or method == "sl":
        assert ("weights", None) in whats  # the one copy
    steps = {event["step"] for event in told if event["what"] == "loss"}
    assert method == "sl" or steps == {1}  # in SL the next device begins with what is broken
    rounds = [event for event in strictly(run.folder) if event["event"] == "round_finished"]
    assert rounds[-1]["loss"] is None and events[-1]["event"] == "run_finished"
    assert any(not np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(run.params))
    load(run.folder, network)
    for event in strictly(run.folder):  # whoever reads them copes
        assert None not in scalars(event).values()
        state = RunState()
        state.follow(event, 0.0)
        describe(event, state)
    assert make_page([read_run(run.folder)])


@pytest.mark.parametrize("method", ["fl", "mpsl"])
def test_an_average_that_is_not_finite_ends_the_run(method, tmp_path):
    """At the coordinator, and on the node where copies live together."""
    made, samples = setting(method, tmp_path, aggregation__learning_rate=TOO_FAST)
    made.optimizer.learning_rate = 10.0
    line = "all devices, round 0, step 0: after it the average of .* is not finite"
    with pytest.raises(RunError, match=line):
        trained(made, samples, support.model(dtype="float32"))


class Edge(nnx.Module):
    """Its value is finite, its gradient is not: the slope of a root at zero."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(math.prod(support.SHAPE), support.CLASSES, rngs=rngs)
        self.edge = nnx.Param(jnp.zeros(support.CLASSES))

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1)) + jnp.sqrt(self.edge[...] ** 2)


def test_gradients_that_are_not_finite_while_the_loss_is(tmp_path):
    made, samples = setting("fl", tmp_path)
    network = stages.Model.from_units("own", [("edge", Edge)], support.SHAPE, support.CLASSES)
    with pytest.raises(RunError, match=r"device \d, round 0, step 0: after it the weights of edge"):
        support.trained(made, samples, network)


def test_the_line_names_few_units_and_whose_they_are():
    found = NonFinite("average", None, 2, 17, tuple("abcde"))
    assert finite.line(found).startswith(
        "all devices, round 2, step 17: after it the average of a, b, c and 2 more is not finite"
    )
    assert finite.event(found)["device"] is None
    one = finite.line(NonFinite("loss", 1, 0, 3))
    assert one.startswith("device 1, round 0, step 3: the loss is not finite")


@pytest.mark.soak
def test_a_process_ends_with_code_1_and_the_line(tmp_path):
    train = Binary("train", "--config=digits", "--config.optimizer.learning_rate=1e30",
                   f"--config.run.dir={tmp_path}")  # fmt: skip
    try:
        assert train.wait() == 1
    finally:
        train.close()
    assert re.search(r"device \d, round 0, step \d: the loss is not finite", train.output)
    assert not list(tmp_path.rglob("weights.safetensors"))
