"""The flags of benchmarks: what is wrong is told before anything is measured, and what is kept."""

from __future__ import annotations

import ast
import json
import re
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
                ("bench_start --override=--config.name=x", "--config.name is what this benchmark"),
                ("bench_start --override=--config.run.dir=x", "--config.run.dir is what"),
                ("bench_codec --data_dir=README.md", "README.md is a file: name a folder"),
                ("bench_accept --data_dir=/no/such", "there is no folder /no/such"),
                ("bench_pipeline --data_dir=~no-such-user", "--data_dir=~no-such-user"),
                ("bench_multihop --profiles=/no/such", "there is no folder /no/such"),
                ("bench_multihop --only=memories", "memory"),
                ("validate_simulator --only=typo", "--only='typo' is in the name of no setting"),
                ("bench_stages --cores=1,two", "'two' is not a whole number above 0"),
                ("bench_stages --batches=", "'' is not a whole number above 0"),
                ("bench_rounds --sizes_mb=0", "'0' is not a number above 0"),
                ("bench_tuner --results=README.md", "README.md is a file: name a folder"),
                ("bench_privacy --slowdown=nan", "'nan' is not a number above 0"),
                ("bench_accept --part=time --only=typo", "--only='typo' is in the name of no"),
                ("bench_privacy --part=accuracy --only=typo --data_dir=.", "--only='typo' is in"),
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


BENCHMARKS = sorted(
    path
    for path in (ROOT / "experiments").glob("*.py")
    if "harness.run(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_quick_overrides_no_flag_that_was_given(path: Path) -> None:
    """``Bench.reduced`` asks whether a flag was given before another value takes its place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.IfExp | ast.If) and "run.quick" in ast.unparse(node.test):
            ways = [node.body, node.orelse]
            texts = [ast.unparse(way) for way in ways if isinstance(way, ast.AST)]
            texts += [ast.unparse(one) for way in ways if isinstance(way, list) for one in way]
            flags = {name for text in texts for name in re.findall(r"[A-Z_]+\.value", text)}
            assert not flags, f"{path.name}:{node.lineno}: {flags}"


def test_flags_that_name_files_and_folders_read_them_as_paths() -> None:
    """``~`` is the user's home, and a file is no folder, before anything is measured."""
    for path in sorted((ROOT / "experiments").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "flags.DEFINE_string":
                text = ast.unparse(node.args[2])
                assert not re.match(r"'(File|Folder)\b", text), f"{path.name}:{node.lineno}: {text}"


@pytest.mark.soak
@pytest.mark.parametrize(
    "command",
    [
        "bench_accept --part=accuracy",
        "bench_privacy --part=accuracy --part=epochs",
        "bench_multihop --only=golden",
    ],
)
def test_a_part_that_cannot_be_measured_is_no_success(command: str, tmp_path: Path) -> None:
    (file := tmp_path / "rows.json").write_text("those of a whole run")
    done = run(*command.split(), f"--json={file}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: nothing was measured: ")
    assert file.read_text() == "those of a whole run"
