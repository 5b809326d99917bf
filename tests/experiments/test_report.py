"""The report's command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipar_jax.config import Config, to_json
from tests.patience import PROCESS_S

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S)


def test_what_is_no_run_ends_with_one_line(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} is not the folder of a run")
    assert "Traceback" not in result.stderr


def test_without_a_folder_the_usage_is_shown() -> None:
    result = run()
    assert result.returncode == 2
    assert "name at least one run's folder" in result.stdout + result.stderr


def test_a_report_lies_in_the_runs_folder_or_where_it_is_wanted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(Config()))
    (folder / "metrics.jsonl").write_text("")
    assert run(str(folder)).stdout.strip() == f"wrote {folder / 'report.html'}"
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    (folder / "report.html").write_text("of this run and another one")
    assert run(str(folder)).stdout.strip() == f"wrote {folder / 'report-2.html'}"
    assert (folder / "report.html").read_text() == "of this run and another one"
    other = tmp_path / "other.html"
    assert run(str(folder), f"--output={other}").returncode == 0
    assert other.exists()
    wrong = run(str(folder), f"--output={tmp_path}")
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: --output={tmp_path} is a folder: name a file\n"
