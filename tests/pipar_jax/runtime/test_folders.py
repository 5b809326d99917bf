"""A run's folder has one run in it, and says whose model that was."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
from flax import nnx

import pipar_jax
import stages
from pipar_jax.config import Config, from_json
from pipar_jax.errors import RunError
from pipar_jax.launch.api import train
from pipar_jax.launch.finished_run import load
from pipar_jax.launch.run_folders import hold_folder
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.server import run_server
from tests.pipar_jax.runtime import support

SAMPLES = (9,)


class Layer(nnx.Module):
    """A dense layer of float32."""

    def __init__(self, inputs, outputs, rngs):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1))


def own_model(name="mine", width=12, classes=10):
    """A small model that nobody has registered."""
    units = [("first", lambda rngs: Layer(64, width, rngs)),
             ("out", lambda rngs: Layer(width, classes, rngs))]  # fmt: skip
    return stages.Model.from_units(name, units, support.SHAPE, classes)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir() if path.is_file()}  # fmt: skip


def test_a_second_run_under_a_name_gets_a_folder_of_its_own(tmp_path):
    made = support.config(tmp_path, SAMPLES, method="fl", dtype="float32")
    data, network = support.datasets(SAMPLES), own_model()
    first = train(made, network, data)
    before = hashes(first.folder)
    made.seed = 5
    second = train(made, network, data)
    assert (first.folder.name, second.folder.name) == ("run", "run-2")
    assert hashes(first.folder) == before and hashes(second.folder).keys() == before.keys()
    assert (second.config.name, second.config.seed, made.name) == ("run-2", 5, "run")
    assert [e["event"] for e in second.metrics].count("run_started") == 1
    unit = network.unit_names[0]
    assert any((np.asarray(second.params[unit][path]) != array).any()
               for path, array in first.params[unit].items())  # fmt: skip
    with pytest.raises(RunError, match=r"metrics.jsonl belongs to another run"):
        run_server(resolve(first.config, models=["mine"]), on_event=lambda event: None,
                   model=network, data=data[-1])  # fmt: skip
    assert hashes(first.folder) == before

    # Weights are saved before anything else that comes after the last round.
    assert [e["event"] for e in first.metrics][-3:] == ["saving", "evaluated", "run_finished"]
    # The model goes by its own name, and only its maker can make it again.
    assert first.config.model.name == "mine"
    assert [e["model"] for e in first.metrics if e["event"] == "run_started"] == ["mine"]
    with pytest.raises(RunError, match=r"your own model 'mine'.*load\(folder, model\)"):
        pipar_jax.load(first.folder)
    again = load(first.folder, own_model())
    assert str(first.folder) in repr(again) and len(repr(again)) < 300  # no weights
    np.testing.assert_array_equal(again.outputs(data[-1].test.x),
                                  first.outputs(data[-1].test.x))  # fmt: skip
    with pytest.raises(RunError, match=r"first/linear/.*expects"):
        load(first.folder, own_model(width=13))
    with pytest.raises(RunError, match=r"and 10 classes, and 'mine' has .* and 11"):
        load(first.folder, own_model(classes=11))


def test_runs_that_begin_at_once_do_not_share_a_folder(tmp_path):
    configs = []
    for seed in range(8):
        config = resolve(Config(name="run", seed=seed))
        config.run.dir = str(tmp_path)
        configs.append(config)
    start = threading.Barrier(len(configs))
    found = [None] * len(configs)

    def begin(index):
        start.wait()
        with hold_folder(configs[index]) as held:
            found[index] = held.path

    threads = [threading.Thread(target=begin, args=(i,)) for i in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in found) == ["run", *(f"run-{i}" for i in range(2, 9))]
    for path, config in zip(found, configs, strict=True):
        kept = from_json((path / "config.json").read_text())
        assert (kept.name, kept.seed) == (path.name, config.seed)
