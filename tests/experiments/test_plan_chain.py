"""The chain planner's command line, on a table of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROCESS_S

ROOT = Path(__file__).parents[2]
TABLE = """device,layer,forward_ms,backward_ms,update_ms,activation_kb,weight_kb
box,0,1,1,0,100,1
box,1,10,20,0,100,10
box,2,10,20,0,100,10
box,3,10,20,0,100,10
box,4,10,20,0,100,10
box,5,10,20,0,100,0
box,6,0,0,0,10,10
phone,0,10,10,0,100,1
phone,1,90,90,0,100,10
phone,2,90,90,0,100,10
phone,3,90,90,0,100,10
phone,4,90,90,0,100,10
phone,5,90,90,0,100,0
phone,6,5,5,0,10,10
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def run(table: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.plan_chain", f"--profile={table}"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S
    )


def test_cost_and_cuts_are_printed(table: Path) -> None:
    result = run(table, "--device=box", "--layers=1:7", "--speeds=1,1.5", "--objective=mpsl",
                 "--noany_order")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "mpsl: 60.000 ms per batch (longest forward 20.000, longest backward 40.000)" in (
        result.stdout
    )
    assert "cuts: 3" in result.stdout
    assert "node1 │ 1:3" in result.stdout
    assert "1 of these layers have no measured" in result.stdout


def test_owners_links_and_memory_count(table: Path) -> None:
    arguments = ["--device=box", "--layers=1:6", "--speeds=1,1", "--owners=4"]
    owner = ["--owner=phone", "--owner_link=8/8"]
    cycle = run(table, *arguments, *owner)
    # Own layers 30 ms, the nodes 150, four transfers of 100 KiB at 1 MB/s 409.6.
    assert "one owner's cycle: 589.600 ms" in cycle.stdout, cycle.stderr
    assert "steady: 147.400 ms per batch" in cycle.stdout
    step = run(table, *arguments, *owner, "--objective=step", "--micro_batches=5")
    # One of 20 parts takes its cycle; the others go at the pace of a node's three layers, 90 ms.
    assert "step: 114.980 ms per batch" in step.stdout, step.stderr
    refused = run(table, *arguments, "--memory_mb=0.5,0.5")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: layers 1 to 5 for 4 owners need")
    shared = run(table, *arguments, "--memory_mb=0.5,0.5", "--weights=shared", "--in_flight=1")
    assert shared.returncode == 0, shared.stderr


@pytest.mark.soak
def test_mistakes_end_with_one_line(table: Path) -> None:
    for arguments, message in (
        (["--layers=1"], "--layers=1: write FIRST:STOP in whole numbers"),
        (["--layers=2.9:6"], "--layers=2.9:6: write FIRST:STOP in whole numbers"),
        (["--layers=-1:6"], "--layers=-1:6: write FIRST:STOP in whole numbers"),
        (["--layers=1:9"], "layers 1:9 are not a valid range"),
        (["--layers=1:6", "--speeds=1,fast"], "--speeds=1,fast: 'fast' is not a number above 0"),
        (["--layers=1:6", "--speeds=1,0"], "--speeds=1,0: '0' is not a number above 0"),
        (["--layers=1:6", "--memory_mb=-1"], "--memory_mb=-1: '-1' is not a number above 0"),
        (["--layers=1:6", "--node_mbps=inf"], "--node_mbps=inf: 'inf' is not a number above 0"),
        (["--layers=1:6", "--node_mbps=0"], "--node_mbps=0: '0' is not a number above 0"),
        (["--layers=1:6", "--codec_ratio=nan"], "--codec_ratio=nan: 'nan' is not a number"),
        (["--layers=1:6", "--owner=phone", "--owner_link=8/-8"], "'-8' is not a number above 0"),
        (["--layers=1:6", "--speeds=1,1", "--memory_mb=1"], "--memory_mb has 1 numbers"),
        (["--layers=1:6", "--owner=phone", "--owner_link=8"], "--owner_link=8: write UP/DOWN"),
        (["--layers=1:6", "--owner_link=8/8"], "--owner_link has no effect without --owner"),
        (["--layers=1:6", "--in_flight=2"], "--in_flight needs --weights=shared"),
        (["--layers=1:6", "--micro_batches=2"], "--micro_batches is only for --objective=step"),
        (["--layers=1:6", "--device=tablet"], "no device 'tablet': it has box, phone"),
    ):
        result = run(table, *(["--device=box", *arguments]))
        assert result.returncode == 2
        assert message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
