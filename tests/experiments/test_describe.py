"""The description of a model, as a user sees it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import stages
from experiments.describe import make_lengths, resolve_cuts
from pipar_jax.config import AUTO, Config
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS
from tests.patience import PROCESS_S

ROOT = Path(__file__).parents[2]


def _describe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.describe", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S)


def test_units_and_stages_are_printed_without_data():
    done = _describe("--config=cifar10_vgg5", "--stages=conv1,3")
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # such as jax's word of an accelerator that is not there
    assert "vgg5, 582,346 parameters, micro-batch 25" in done.stdout
    assert "stages of cuts 1, 3" in done.stdout
    # What crosses cut 1 of 25 samples: 25 x 16 x 16 x 32 numbers of four bytes.
    (row,) = [line for line in done.stdout.splitlines() if "conv2 … conv3" in line]
    assert "8x8x64" in row
    (first, again) = [line for line in done.stdout.splitlines() if line.startswith("│ conv1 ")]
    assert "819.2" in first and "960" in again


def test_the_codecs_of_a_plan_that_the_tuner_is_to_find_are_explained():
    done = _describe("--config=cifar10_vgg5", "--config.method=auto")
    assert done.returncode == 0, done.stderr
    assert "micro-batch 100" in done.stdout  # N is not known yet
    assert "codecs: bits:7 or finer on slow links" in done.stdout


def test_a_cut_that_does_not_exist_is_explained():
    done = _describe("--config=cifar10_vgg5", "--stages=conv9")
    assert done.returncode == 2
    assert "--stages=conv9" in done.stderr and "'conv3'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cuts_are_those_of_the_method_unless_others_are_asked_for():
    model = stages.build("mlp", input_shape=(8, 8, 1), classes=10)
    config = Config()
    config.pipeline.cut, config.pipeline.cuts = 1, "fc1, 3"
    for name, method in METHODS.items():
        config.method = name
        expected = (1, 3) if method.uses_nodes else (1,) if method.cuts else ()
        assert resolve_cuts(config, model, "") == expected, name
        assert resolve_cuts(config, model, "2,fc3") == (2, 3), name
    config.method, config.pipeline.cuts = "mpsl", ""  # the planner's to find
    assert resolve_cuts(config, model, "") == (1,)
    config.method = AUTO
    assert resolve_cuts(config, model, "") == (1,)


class Whole(nnx.Module):
    """A network that has no cut."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1))


def test_a_network_without_a_cut_is_described_where_nothing_is_cut():
    model = stages.build("mlp", input_shape=(8, 8, 1), classes=10)
    whole = stages.Model.from_units("one", [("all", Whole)], (8, 8, 1), 10)
    config = Config(method="fl")
    assert resolve_cuts(config, whole, "") == ()
    assert len(stages.stage_facts(whole, (), 4)) == 1
    config.method, config.pipeline.cut = "pipar", 1
    with pytest.raises(ConfigError, match=r"^pipeline\.cut=1: "):
        resolve_cuts(config, whole, "")
    with pytest.raises(ConfigError, match=r"^--stages=4: "):
        resolve_cuts(config, model, "4")
    config.method, config.pipeline.cuts = "accept", "1,9"
    with pytest.raises(ConfigError, match=r"^pipeline\.cuts=1,9: "):
        resolve_cuts(config, model, "")


def test_side_inputs_and_who_takes_them_are_printed(tmp_path):
    """The sequences of the page on data: lengths go to the LSTM, and to nobody else."""
    page = (ROOT / "docs" / "bring-your-data.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mydata.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.describe", "--config=digits",
         "--config.data.source=module:mydata:sequences", "--config.data.normalise=none",
         "--config.model.name=module:mydata:reader"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"lengths │ int32\[\] +│ lstm_cell", done.stdout), done.stdout


@pytest.mark.soak
def test_how_much_activations_tell_of_inputs_is_measured_where_it_is_asked_for():
    done = _describe("--config=digits", "--dependence=64")
    assert done.returncode == 0, done.stderr
    assert "dependence" in done.stdout
    units = done.stdout.partition("stages of cuts")[0]
    rows = [line.split("│") for line in units.splitlines() if line.startswith("│")]
    found = [float(row[-2]) for row in rows]
    assert len(found) == 5 and all(0 < value < 1 for value in found)
    assert found[0] > 0.8 and found[0] > found[-1]  # a convolution tells nearly everything
    short = _describe("--config=digits", "--dependence=3")
    assert short.returncode == 2 and "a distance correlation needs 4" in short.stderr


def test_why_the_lengths_of_a_device_are_not_known_is_said(tmp_path):
    config = Config()
    config.devices.count, config.data.pad_to, config.data.normalise = 1, "2,4", "none"
    config.data.source = f"npz:{tmp_path}/{{device}}.npz"
    missing = make_lengths(config)
    assert "there is no file" in missing.caption and missing.row_count == 1
    x, y = np.zeros((2, 4), int), np.zeros(2, int)
    np.savez(tmp_path / "0.npz", x_train=x, y_train=y, lengths_train=[1, 4])
    assert make_lengths(config).caption is None
    config.data.pad_to = "2,3"
    assert "data.pad_to goes to 3" in make_lengths(config).caption
