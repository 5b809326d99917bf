"""The demo, small: two methods once over TCP between real processes, and the table at the end."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipar_jax.methods.registry import server_methods
from pipar_jax.methods.resolution import resolve
from tests.patience import PROCESS_S
from tests.sources import ROOT

SMALL = (
    "--config.epochs=1",
    "--config.model.name=mlp",
    "--config.data.train_samples=200",
    "--config.devices.defaults.slowdown=1",
    "--config.devices.defaults.link=lan",
)


def _quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )


def test_each_method_runs_and_is_a_row_of_the_table(tmp_path: Path) -> None:
    result = _quickstart(*SMALL, "--methods=fl,pipar", f"--config.run.dir={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 processes that communicate over TCP" in result.stdout
    assert "lan (1000 Mbit/s up and 1000 Mbit/s down)" in result.stdout
    table = result.stdout[result.stdout.index("over FL") :]
    # Seconds per epoch, speed-up, two idle shares, megabytes up and down, accuracy.
    figures = r"\S+x\s+\d+%\s+\d+%\s+\d+\.\d\d\s+\d+\.\d\d\s+\d+\.\d%"
    for title in ("FL", "PiPar"):
        assert re.search(rf"^ *{title} .*{figures}", table, re.M), table
    assert re.search(r"(FL|PiPar) is the fastest here", result.stdout)
    assert "<html" in (tmp_path / "quickstart.html").read_text(encoding="utf-8")
    # Away from a terminal: plain lines, no control characters.
    assert "\x1b" not in result.stdout + result.stderr
    assert "round 1 of 1 took" in result.stderr
    for method in ("fl", "pipar"):
        folder = tmp_path / f"quickstart-{method}"
        assert (folder / "weights.safetensors").is_file()
        assert json.loads((folder / "config.json").read_text())["method"] == method


def test_every_method_that_is_compared_by_default_fits_the_preset() -> None:
    quickstart = importlib.import_module("experiments.quickstart")
    methods = quickstart.Extra().methods.split(",")
    assert methods == list(server_methods())
    for method in methods:
        config = importlib.import_module("configs.quickstart").get_config()
        config.method = method
        resolve(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--methods=fl,pippar", "did you mean 'pipar'"),
        ("--config.devices.defaults.lnk=4g", "--config.devices.defaults.link"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argument: str, message: str) -> None:
    result = _quickstart(argument)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.soak
def test_the_demo_reaches_95_percent_by_every_method_and_pipar_is_ahead(tmp_path: Path) -> None:
    result = _quickstart(f"--config.run.dir={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    summaries = {}
    for method in server_methods():
        lines = (tmp_path / f"quickstart-{method}" / "metrics.jsonl").read_text().splitlines()
        summaries[method] = next(
            row for row in map(json.loads, lines) if row["event"] == "run_finished"
        )
    assert {m: s for m, s in summaries.items() if s["metrics"]["accuracy"] < 0.95} == {}
    fastest = min(summaries, key=lambda method: summaries[method]["epoch_seconds"])
    assert fastest == "pipar"
