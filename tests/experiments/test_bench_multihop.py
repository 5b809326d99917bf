"""The benchmark of chains as a binary: parts that it cannot measure are no success."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.patience import PROCESS_S

COMMAND = [sys.executable, "-m", "experiments.bench_multihop"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=golden", "--profiles={folder}"], "golden values of vgg19 skipped: there is no "),
    ],
)
def test_what_is_missing_is_said_and_leaves_the_rows_of_another_run(tmp_path, flags, says):
    (file := tmp_path / "rows.json").write_text("those of a whole run")
    done = subprocess.run(
        [*COMMAND, *(flag.format(folder=tmp_path) for flag in flags), f"--json={file}"],
        capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert says in done.stdout.replace("\n", " ")
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: nothing was measured: ") and says in error
    assert file.read_text() == "those of a whole run"
