"""The binaries of the latency predictor: gather, train, judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.latency_data.timings import Timings
from pipar_jax.profiling.predictor.latency_model import load

ROOT = Path(__file__).parents[2]


def run(binary: str, *arguments: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{binary}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.soak
def test_times_are_gathered_and_trained_on(tmp_path: Path) -> None:
    times, network = tmp_path / "times.npz", tmp_path / "network.safetensors"
    found = run("collect_latency", f"--out={times}", "--quick", "--networks=mlp", "--variants=core")
    assert found.returncode == 0, found.stderr
    gathered = Timings.load(times)
    assert {one.network for one in gathered.layers} == {"mlp"}
    assert gathered.devices[0].name == "core-plain"
    assert np.isfinite(gathered.forward_s).all() and (gathered.backward_s > 0).all()
    trained = run("train_predictor", f"--timings={times}", f"--out={network}", "--steps=2")
    assert trained.returncode == 0, trained.stderr
    assert "mlp" not in load(network).about
    assert f"on {len(gathered.devices)} devices" in load(network).about


def test_a_machine_that_this_one_cannot_be_is_an_error(tmp_path: Path) -> None:
    found = run("collect_latency", f"--out={tmp_path / 'times.npz'}", "--variants=abacus")
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith("error: --variants=abacus")


@pytest.mark.soak
def test_what_is_in_the_way_is_told_before_anything_is_timed(tmp_path: Path) -> None:
    (taken := tmp_path / "times.npz").write_text("somebody's")
    wrong, made = tmp_path / "no" / "file", tmp_path / "made"
    for binary, arguments, says in (
        ("collect_latency", [f"--out={taken}"], f"{taken} does not contain times of layers"),
        ("collect_latency", [f"--out={wrong}"], f"--out={wrong}: the folder "),
        ("train_predictor", [f"--out={wrong}"], f"--out={wrong}: the folder "),
        ("train_predictor", [f"--out={made}", f"--timings={wrong}"], f"{wrong} cannot be read"),
        ("bench_predictor", [f"--timings={taken}"], f"{taken} does not contain times of layers"),
    ):
        found = run(binary, *arguments)
        assert found.returncode == 2, found.stderr
        line = found.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ") and says in line
    assert taken.read_text() == "somebody's" and not made.exists()


@pytest.mark.soak
def test_a_network_that_is_not_timed_is_an_error_beside_one_that_is(tmp_path: Path) -> None:
    arguments = ("--quick", "--networks=mlp,abacus", "--variants=core")
    found = run("collect_latency", f"--out={tmp_path / 'times.npz'}", *arguments)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith("error: --networks=abacus is not among")


@pytest.mark.soak
def test_the_benchmark_reports_errors_and_regret(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    found = run("bench_predictor", "--quick", f"--json={file}", timeout=400)
    assert found.returncode == 0, found.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    for networks in ("known", "new"):
        regret = rows[f"{networks} networks, partition over 4 devices: mean regret"]
        assert regret["target"] == 3.0
    assert rows["new devices, 0 samples: predictor, MAPE"]["value"] > 0
