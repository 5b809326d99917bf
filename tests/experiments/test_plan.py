"""The binaries that measure and plan: what they print, and the profile that goes between them."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import quickstart
from experiments import plan
from pipar_jax.cost_model.profile import DeviceProfile, Profile
from pipar_jax.errors import ConfigError
from tests.patience import PROCESS_S
from tests.pipar_jax.tuner import profiles
from tests.pipar_jax.tuner.profiles import bit_codecs, device, node

ROOT = Path(__file__).parents[2]
MODEL = "--config.model.name=mlp"


def profile(*devices: DeviceProfile, **values: Any) -> Profile:
    """A made-up profile that fits the preset with ``MODEL``."""
    batch = quickstart.get_config().data.batch_size
    made = profiles.profile(*devices, **values)
    return dataclasses.replace(made, model="mlp", batch_size=batch)


def run(binary: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{binary}", "--config=quickstart", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip


def test_a_profile_is_measured_printed_and_planned_with(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    small = ("--config.model.name=mlp", "--config.tuner.sizes=10", "--config.devices.count=1",
             "--config.tuner.codecs=raw,float16", "--config.tuner.cache=false")  # fmt: skip
    measured = run("profile", *small, f"--json={file}")
    assert measured.returncode == 0, measured.stderr
    assert "server: milliseconds by samples" in measured.stdout
    assert "codec float16: 0.500 of the bytes" in measured.stdout
    found = Profile.from_dict(json.loads(file.read_text()))
    assert [unit.name for unit in found.units]
    assert all(row[0] > 0 for row in found.server.backward_s)
    slow = found.devices[0].host
    assert sum(slow.update_s) > 2 * sum(found.server.update_s)  # fifty times, and some noise
    planned = run("plan", *small, f"--profile={file}")
    assert planned.returncode == 0, planned.stderr
    assert "paper's" in planned.stdout
    assert "--config.method=auto would run: " in planned.stdout


def test_the_best_plan_stands_first_with_what_binds_it(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(profile(*[device("4g", 1.0)] * 2).to_dict()))
    result = run("plan", f"--profile={file}", MODEL)
    assert result.returncode == 0, result.stderr
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    epochs = [float(row[6]) for row in rows[:-1]]
    assert epochs == sorted(epochs)
    assert float(rows[-1][6]) >= epochs[0] * 0.9999
    assert {row[1].split()[0] for row in rows[:-1]} == {"fl", "sl", "sfl", "pipar"}
    assert "proven to be no faster" in result.stdout


def test_it_says_for_each_link_why_its_tensors_are_coded_or_not(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    made = profile(device("4g", 3.0), device("none", 3.0), codecs=bit_codecs())
    file.write_text(json.dumps(made.to_dict()))
    result = run("plan", f"--profile={file}", MODEL, "--config.tuner.codecs=auto",
                 "--config.tuner.methods=pipar")  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = codecs_rows(result.stdout)
    assert [row[0] for row in rows] == ["d0 → server", "server → d0", "d1 → server", "server → d1"]
    assert all(row[-1].startswith("on: ") for row in rows[:2])
    assert all("the link is faster than the codec" in row[-1] for row in rows[2:])


def test_codecs_are_looked_at_unless_they_are_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    made = profile(device("4g", 1.0), codecs=bit_codecs())
    file.write_text(json.dumps({**made.to_dict(), "model": "vgg5"}))
    arguments = (f"--profile={file}", "--config.devices.count=1", "--config.tuner.methods=pipar")
    result = run("plan", *arguments)
    assert result.returncode == 0, result.stderr
    assert all(row[-1].startswith("on: ") for row in codecs_rows(result.stdout))
    assert "no loss of accuracy beyond chance" in result.stdout.replace("\n", " ")
    raw = run("plan", *arguments, "--config.tuner.codecs=raw")
    assert raw.returncode == 0, raw.stderr
    assert "bits:" not in raw.stdout and "codecs:" not in raw.stdout


def test_it_says_so_for_each_boundary_of_a_chain(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    nodes = (node("none", 2.0, units=10), node("none", 4.0, units=10))
    made = profile(device("4g", 8.0, units=10), units=10, codecs=bit_codecs(), nodes=nodes)
    file.write_text(json.dumps(made.to_dict()))
    result = run(
        "plan", f"--profile={file}", MODEL, "--config.method=accept", "--config.devices.count=1",
        "--config.nodes.count=2", "--config.tuner.codecs=auto",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = codecs_rows(result.stdout)
    assert [row[0] for row in rows] == ["d0 → n1", "n1 → d0", "n1 → n2", "n2 → n1"]
    assert [row[4] == "raw" for row in rows] == [False, False, True, True]
    assert rows[0][-1].startswith("on: ") and rows[2][-1].startswith("off: the link is faster")


def codecs_rows(text: str) -> list[list[str]]:
    """Returns the cells of the table of codecs, whose longer ones go over several lines."""
    rows: list[list[str]] = []
    for line in text.partition("codecs of the best plan")[2].splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows.append(cells)
        elif cells:
            rows[-1] = [" ".join(pair).strip() for pair in zip(rows[-1], cells, strict=True)]
    return rows


def test_errors_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(profile(device()).to_dict()))
    (binary := tmp_path / "binary").write_bytes(b"\x80\x00")
    (other := tmp_path / "other").write_text("{}")
    for arguments, message in (
        ((f"--profile={tmp_path / 'none'}",), "cannot be read: No such file"),
        ((f"--profile={file}", MODEL, "--config.devices.count=3"), "--config.devices.count=1"),
        (("--config.tuner.methods=fl,pipr",), "did you mean 'pipar'"),
        (("--config.tuner.micro_batches=2,x",), "'x' is not a positive whole number"),
        (("--config.tuner.codecs=zip",), "unknown codec 'zip'"),
        ((f"--profile={binary}",), f"--profile={binary} cannot be read: not a text file"),
        ((f"--profile={other}",), f"--profile={other}: this is not a profile"),
    ):
        result = run("plan", *arguments)
        assert result.returncode == 2
        assert message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and "unexpected" not in result.stderr


def test_a_profile_of_something_else_is_refused_with_the_field() -> None:
    config, made = quickstart.get_config(), profile(device(), device(), nodes=(node(),))
    config.model.name = "mlp"
    plan.check_fits(config, made)
    config.method, config.nodes.count = "mpsl", 1
    plan.check_fits(config, made)
    for field, value, says in (
        (
            "model",
            "cnn",
            "model is mlp and the configuration's is cnn: set --config.model.name=mlp",
        ),
        (
            "data",
            7,
            "mini-batch is 50 and the configuration's is 7: set --config.data.batch_size=50",
        ),
        ("devices", 3, "number of devices is 2 and the configuration's is 3: set "),
        ("nodes", 2, "number of compute nodes is 1 and the configuration's is 2: set "),
    ):
        wrong = copy.deepcopy(config)
        name = {"model": "name", "data": "batch_size"}.get(field, "count")
        setattr(getattr(wrong, field), name, value)
        with pytest.raises(ConfigError, match=f"^the profile's {says}"):
            plan.check_fits(wrong, made)


def test_a_profile_that_cannot_be_written_is_told_before_it_is_measured(tmp_path: Path) -> None:
    result = run("profile", f"--json={tmp_path / 'no' / 'profile.json'}")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"error: --json={tmp_path}/no/profile.json: the folder ")
