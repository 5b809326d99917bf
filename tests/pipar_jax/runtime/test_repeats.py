"""A run repeats bit for bit, whatever arrives first, and does nothing before what it waits for.

Over every registered method, with equal and with ragged shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipar_jax.config import Config
from pipar_jax.launch.launcher import launch
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.actions import RECEIVE_CLIENT_MODEL
from pipar_jax.schedule.plan import Plan
from pipar_jax.schedule.trace import Trace
from tests.pipar_jax import precedence
from tests.pipar_jax.runtime import support

ROUNDS, BATCH, RUNS = 3, 7, 5
SHARDS = {"equal": (14, 14), "ragged": (13, 20)}
#: Ragged shards are the harder case: one method is enough with equal ones in `make test`.
SOAKED = {("equal", method) for method in METHODS if method != "pipar"}


def setting(method: str, folder: Path, samples: tuple[int, ...]) -> Config:
    """Three rounds with momentum and batch statistics, a copy of the weights for each device."""
    made = support.config(folder, samples, name="cnn", dtype="float32", method=method, batch=BATCH)
    made.model.norm, made.optimizer.momentum = "batch", 0.9
    made.pipeline.cut, made.pipeline.micro_batches, made.pipeline.weights = 2, 3, "copy"
    made.aggregation.every, made.epochs = "epoch", ROUNDS
    if METHODS[method].uses_nodes:
        made.nodes.count, made.pipeline.cuts = (
            (1, "1,2") if METHODS[method].labels_home else (2, "1,2")
        )
    return made


def shards_of(method: str, shards: str) -> tuple[int, ...]:
    """AccEPT's chain trains one device."""
    return SHARDS[shards][:1] if METHODS[method].one_device else SHARDS[shards]


def digest(folder: Path) -> str:
    """Hashes a run's tensors by name, not the file that holds them."""
    found = hashlib.sha256()
    for name, array in sorted(load_file(folder / "weights.safetensors").items()):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return found.hexdigest()


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize(
    ("method", "shards"),
    [
        pytest.param(method, shards, marks=[pytest.mark.soak] * ((shards, method) in SOAKED))
        for method in METHODS
        for shards in SHARDS
    ],
)
def test_two_runs_of_a_process_are_equal_and_in_order(method, shards, tmp_path):
    """The second over a slow link, so that other things arrive first."""
    network = support.model("cnn", "float32", "batch")
    samples = shards_of(method, shards)
    found = []
    for link in ("none", "20/20/4ms"):
        made = setting(method, tmp_path / link.replace("/", "-"), samples)
        made.devices.overrides = {0: {"link": link}}
        run = support.trained(made, samples, network)
        found.append(digest(run.folder))
        trace = run.trace()
        plan = Plan.from_dict(trace.meta["plan"])
        schedules = precedence.schedules(plan, samples, BATCH, ROUNDS)
        assert len(schedules) == len(trace.rounds) == ROUNDS
        assert precedence.violations(trace, schedules) == []
    assert found[0] == found[1]


def test_an_action_that_starts_too_early_is_found(tmp_path):
    network = support.model("cnn", "float32", "batch")
    samples = SHARDS["equal"]
    trace = support.trained(setting("sl", tmp_path, samples), samples, network).trace()
    plan = Plan.from_dict(trace.meta["plan"])
    schedules = precedence.schedules(plan, samples, BATCH, ROUNDS)

    def planted(host, change):
        rows = [change(row) for row in trace.hosts[host]]
        bad = Trace({**trace.hosts, host: [row for row in rows if row is not None]}, trace.rounds)
        return precedence.violations(bad, schedules)

    def late(row):  # as it was: the last device of a round began the next with its own old part
        is_part = row.action.kind == RECEIVE_CLIENT_MODEL and row.action.step == 2
        return row._replace(end_s=row.end_s + 100.0) if is_part else row

    assert "d1.0F0@2 started before d1.0RH@2 was over" in planted("d1", late)
    assert "d0.1U@3 was never done" in planted(
        "server", lambda row: None if str(row.action) == "d0.1U@3" else row
    )
    early = [
        r._replace(start_s=r.start_s - 100.0, end_s=r.end_s - 100.0) for r in trace.hosts["d1"]
    ]
    bad = Trace({**trace.hosts, "d1": early}, trace.rounds)
    assert any("was over before d0.0H@1 began" in line
               for line in precedence.violations(bad, schedules))  # fmt: skip
    twice = Trace({**trace.hosts, "d1": trace.hosts["d1"] * 2}, trace.rounds)
    assert any("was done 2 times" in line for line in precedence.violations(twice, schedules))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("method", METHODS)
def test_runs_of_processes_are_equal(method, shards, tmp_path):
    samples = shards_of(method, shards)
    made = setting(method, tmp_path, samples)
    made.network.deadline_s = 30.0
    paths = []
    for index, count in enumerate(samples):
        data = support.dataset(count, index, test=8)
        paths.append(tmp_path / f"data{index}.npz")
        np.savez(paths[-1], x_train=data.train.x, y_train=data.train.labels,
                 x_test=data.test.x, y_test=data.test.labels, classes=10)  # fmt: skip
    made.data.source = f"npz:{tmp_path}/data{{device}}.npz"
    made.data.test_source, made.data.classes = f"npz:{paths[0]}", 10
    found = set()
    for index in range(RUNS):
        one = resolve(dataclasses.replace(made, name=f"run{index}"))
        found.add(digest(Path(launch(one, on_event=lambda event: None)["folder"])))
    assert len(found) == 1
