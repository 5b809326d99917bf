"""The benchmark of chains as a binary: golden values of a small table, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.patience import PROCESS_S

COMMAND = [sys.executable, "-m", "experiments.bench_multihop"]


def test_tables_that_are_missing_are_said_and_skipped(tmp_path):
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [*COMMAND, "--only=golden", f"--profiles={tmp_path}", f"--json={file}"],
        capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "golden values of vgg19 skipped" in done.stdout.replace("\n", " ")
    assert json.loads(file.read_text()) == []
    wrong = subprocess.run(
        [*COMMAND, "--only=memories"], capture_output=True, text=True, timeout=PROCESS_S
    )
    assert wrong.returncode != 0 and "memory" in wrong.stderr
