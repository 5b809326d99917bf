"""The flags of benchmarks: what is wrong is told before anything is measured, and what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROCESS_S
from tests.sources import ROOT


def run(binary: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{binary}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("bench_stages --networks=vgg5,foo", "'foo' is not known"),
        ("bench_tuner --part=choices --only=typo", "--only='typo' is in the name of no setting"),
        *(
            pytest.param(command, says, marks=pytest.mark.soak)
            for command, says in (
                ("bench_start --presets=digits,typo", "'typo' is not known"),
                ("bench_start --override=--config.epoch=1", "did you mean '--config.epochs'?"),
                ("bench_rounds --clients=2,eight", "'eight' is not a whole number above 0"),
                ("bench_faults --method=pipr", "--method=pipr"),
                ("validate_simulator --only=typo", "--only='typo' is in the name of no setting"),
                ("bench_stages --cores=1,two", "'two' is not a whole number above 0"),
                ("bench_stages --batches=", "'' is not a whole number above 0"),
                ("bench_rounds --sizes_mb=0", "'0' is not a number above 0"),
                ("bench_tuner --results=README.md", "README.md is a file: name a folder"),
                ("bench_privacy --slowdown=nan", "'nan' is not a number above 0"),
                ("bench_accept --part=time --only=typo", "--only='typo' is in the name of no"),
                ("bench_privacy --part=accuracy --only=typo --data_dir=/no", "--only='typo' is in"),
            )
        ),
    ],
)
def test_a_list_with_something_unknown_is_told_before_anything_is_measured(
    command: str, says: str
) -> None:
    done = run(*command.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert not done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and says in line


def test_rounds_that_are_kept_are_those_of_as_many_repeats(tmp_path: Path) -> None:
    for repeats, seconds in ((1, 9.0), (3, 0.5)):
        kept = {"ours": [[[seconds], 1_000_000]] * repeats}
        name = f"rounds_0.4_MB,_2_clients_ours_x{repeats}.json"
        (tmp_path / name).write_text(json.dumps(kept))
    done = run(
        "bench_rounds", "--sizes_mb=0.4", "--clients=2", "--repeats=3",
        f"--results={tmp_path}", f"--json={tmp_path / 'rows.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["0.4 MB, 2 clients, ours, a round"] == 0.5
