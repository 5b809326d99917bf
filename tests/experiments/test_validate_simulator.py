"""The validation's settings and, as a soak, one of them for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import simulator_settings
from pipar_jax.data.own import load_own
from stages.tasks.targets import ClassTargets
from tests.patience import PROCESS_S

ROOT = Path(__file__).parents[2]


def test_there_are_enough_settings() -> None:
    wanted = simulator_settings.settings(quick=False)
    assert len(wanted) >= 24
    assert len({one.name for one in wanted}) == len(wanted)
    stems = {one.network.name: one.network.stem for one in wanted}
    assert stems == {"vgg5": "cifar", "resnet18": "imagenet", "resnet101": "imagenet"}
    assert {one.link for one in wanted} == {"4g", "4g+", "wifi"}
    assert {one.micro_batches for one in wanted} == {1, 4, 10}
    assert {one.devices for one in wanted} == {1, 4}
    assert len(simulator_settings.settings(quick=True)) == 1


def test_every_setting_resolves_and_has_its_data(tmp_path: Path) -> None:
    for setting in simulator_settings.settings(quick=False):
        config = setting.config(tmp_path)
        assert config.model.stem == setting.network.stem
        assert config.devices.count == setting.devices
        assert (config.devices.defaults.slowdown == 1.0) == (setting.devices == 1)
        batch = setting.network.batch
        simulator_settings.write_data(tmp_path, batch)
        train = load_own(
            config.data.source, 0, config.data, part="train", rule=ClassTargets()
        ).train
        assert len(train.x) == simulator_settings.STEPS * batch
        assert train.x.dtype == np.uint8


def test_settings_that_differ_in_n_alone_are_measured_and_saved_together() -> None:
    made = simulator_settings.grouped(simulator_settings.settings())
    assert sum(map(len, made.values())) == len(simulator_settings.settings())
    assert "resnet101 imagenet stem wifi devices=1 N=1-4-10" in made
    for group in made.values():
        assert len({(one.network, one.link, one.devices) for one in group}) == 1
        assert len({one.micro_batches for one in group}) == len(group)
    (name,) = simulator_settings.grouped(simulator_settings.settings()[1:2])
    assert name == "vgg5 4g devices=1 N=4"  # a part of a group is saved apart


@pytest.mark.soak
def test_one_setting_is_predicted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "experiments.validate_simulator", "--quick", f"--json={rows}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PROCESS_S)
    found = {row["name"]: row["value"] for row in json.loads(rows.read_text())}
    assert found["vgg5 wifi N=4 devices=1: round"] > 0
    # Far from the benchmark's target: a test machine may be busy with anything.
    assert abs(found["vgg5 wifi N=4 devices=1: error alone"]) < 60
