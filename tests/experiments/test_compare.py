"""Comparing methods on a preset: real runs, one table, one report; errors before any run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROCESS_S
from tests.sources import ROOT

SMALL = (
    "--config.epochs=1",
    "--config.model.name=mlp",
    "--config.data.train_samples=64",
    "--config.devices.count=1",
)


def _compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.compare", f"--config.run.dir={folder}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )


@pytest.mark.soak  # quickstart is such a comparison
def test_methods_are_compared_on_a_preset(tmp_path: Path) -> None:
    result = _compare(tmp_path, "--config=digits", "--methods=sfl,pipar", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Methods: SFL, PiPar" in result.stdout
    table = result.stdout[result.stdout.index("over SFL") :]  # FL is not there: over the first
    assert re.search(r"^ *SFL .* 1\.00x ", table, re.M), table
    assert re.search(r"^ *PiPar .*x .*%", table, re.M), table
    page = (tmp_path / "digits.html").read_text(encoding="utf-8")
    for method in ("sfl", "pipar"):
        folder = tmp_path / f"digits-{method}"
        assert (folder / "metrics.jsonl").is_file()
        assert folder.name in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods=fl",), "--config is missing"),
        (("--config=digits", "--methods=fl,pippar"), "did you mean 'pipar'"),
        (("--config=digits", "--methods=fl,mpsl"), "nodes.count=0"),
        (("--config=digits", "--method=fl"), "did you mean '--methods'"),
    ],
)
def test_nothing_starts_if_a_method_does_not_fit(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = _compare(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not any(tmp_path.iterdir())
