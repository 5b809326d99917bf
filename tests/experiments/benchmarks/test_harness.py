"""The benchmark harness: what it times, how it judges, what it prints and writes."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags
from rich.console import Console

from experiments.benchmarks import harness
from pipar_jax.errors import ConfigError, RunError
from tests.patience import PROCESS_S
from tests.sources import ROOT


def _bench(**options: object) -> tuple[harness.Bench, io.StringIO]:
    out = io.StringIO()
    return harness.Bench("Sums", console=Console(file=out, width=120), **options), out


def test_cases_take_turns_and_the_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    run, _ = _bench()
    samples = run.compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warm_up=1
    )
    # The warm-up is turn -1 and goes back, then the turns go forth, back and forth.
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert [len(values) for values in samples.seconds.values()] == [3, 3]


def test_quick_runs_fewer_times() -> None:
    run, _ = _bench(quick=True)
    samples = run.compare({"a": lambda: None}, repeats=50)
    assert len(samples.seconds["a"]) == harness.QUICK_REPEATS


def test_the_time_ends_when_the_result_is_ready() -> None:
    class Array:
        waited = 0

        def block_until_ready(self) -> None:
            Array.waited += 1

    run, _ = _bench()
    run.compare({"nested": lambda: (Array(), {"x": [Array()]})}, repeats=2, warm_up=1)
    assert Array.waited == 3 * 2


def test_a_case_may_time_itself() -> None:
    run, _ = _bench()
    times = iter([9.0, 1.0, 2.0, 4.0])
    samples = run.compare({"a": lambda: harness.Seconds(next(times))}, repeats=3)
    assert samples.seconds["a"] == [1.0, 2.0, 4.0]
    assert samples.median("a") == 2.0
    assert samples.minimum("a") == 1.0
    assert samples.spread("a") == pytest.approx((3.0 - 1.5) / 2.0)


def test_ratios_are_paired() -> None:
    # The machine slows down tenfold half-way; neighbours see the same machine.
    samples = harness.Samples({"a": [1.0, 1.0, 10.0, 10.0], "b": [2.0, 2.0, 20.0, 20.0]})
    assert samples.ratio("a", "b") == 0.5


@pytest.mark.parametrize(
    ("value", "target", "better", "met"),
    [
        (1.0, 1.0, "lower", True),
        (1.1, 1.0, "lower", False),
        (1.1, 1.0, "higher", True),
        (0.9, 1.0, "higher", False),
        (float("nan"), 1.0, "lower", False),
        (5.0, None, "lower", None),
    ],
)
def test_a_row_is_judged(value: float, target: float | None, better: str, met: object) -> None:
    run, _ = _bench()
    assert run.row("figure", value, "s", target, better).met is met


def test_a_name_is_reported_once() -> None:
    run, _ = _bench()
    run.row("figure", 1.0, "s")
    with pytest.raises(RunError, match="'figure' twice"):
        run.row("figure", 2.0, "s")


def test_the_report_says_met_and_missed_and_the_file_holds_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    run, out = _bench(json_path=path)
    run.row("fast", 1.5, "ms", 2.0, spread=0.25)
    run.row("throughput", 0.5, "GB/s", 2.0, "higher")
    run.row("broken", float("inf"), "s", 1.0)
    run.row("floor", 12345.6, "ms")
    run.note("The floor is [what] the link alone takes.")
    run.missing("[Peer] is not installed.")
    assert "[Peer] is not installed." in out.getvalue()  # not after half an hour
    run.finish()
    text = out.getvalue()
    assert text.count("[Peer] is not installed.") == 2
    for piece in ("≤ 2 ms", "0.75", "met", "25%", "≥ 2 GB/s", "0.25", "missed", "12,346 ms"):
        assert piece in text
    assert "The floor is [what] the link alone takes." in text
    assert "1 of 3 targets met" in text
    rows = json.loads(path.read_text())
    assert rows[0] == {
        "name": "fast",
        "value": 1.5,
        "unit": "ms",
        "target": 2.0,
        "better": "lower",
        "met": True,
    }
    assert rows[1]["met"] is False
    assert rows[2]["value"] is None
    assert rows[3]["target"] is None and rows[3]["met"] is None


def test_a_file_that_cannot_be_written_is_said_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; create it"):
        _bench(json_path=tmp_path / "nowhere" / "rows.json")


PROGRAM = '''"""A benchmark of nothing.

More about it.
"""
from experiments.benchmarks import harness

def measure(run):
    run.row("quick", float(run.quick), "x", target=0.5)

if __name__ == "__main__":
    harness.run(measure)
'''


def _program(
    tmp_path: Path, *arguments: str, text: str = PROGRAM
) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "bench_nothing.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, path, *arguments],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )


def test_names_with_brackets_are_shown_as_they_are() -> None:
    run, out = _bench()
    run.title = "Sums [of all]"
    run.row("cut[a]", 1.0, "[/s]", target=2.0)
    run.finish()
    for piece in ("Sums [of all]", "cut[a]", "1 [/s]", "met"):
        assert piece in out.getvalue()


def test_rows_are_written_whatever_becomes_of_the_table(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "rows.json"
    run = harness.Bench("Sums", json_path=path, console=Console(file=Full()))
    run.row("figure", 1.0, "s")
    with pytest.raises(OSError, match="No space left"):
        run.finish()
    assert [row["name"] for row in json.loads(path.read_text())] == ["figure"]


def test_what_was_asked_for_is_measured_with_quick_as_well() -> None:
    values = absl_flags.FlagValues()
    flag = absl_flags.DEFINE_integer("repeats_of_a_test", 5, "", flag_values=values)
    for arguments, whole, quick in (([], 5, 1), (["--repeats_of_a_test=7"], 7, 7)):
        values.unparse_flags()
        values(["program", *arguments])
        assert _bench()[0].reduced(flag, 1) == whole
        assert _bench(quick=True)[0].reduced(flag, 1) == quick


def test_a_program_that_measures_nothing_says_so_and_leaves_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("those of a whole run")
    lines = 'run.missing("No figures of [Peer]: it is not installed.")'
    text = PROGRAM.replace('run.row("quick", float(run.quick), "x", target=0.5)', lines)
    result = _program(tmp_path, f"--json={tmp_path / 'rows.json'}", text=text)
    assert result.returncode == 2
    says = "nothing was measured: No figures of [Peer]: it is not installed."
    assert result.stderr == f"error: {says}\n"
    assert (tmp_path / "rows.json").read_text() == "those of a whole run"


def test_a_program_ends_with_0_though_it_misses_its_target(tmp_path: Path) -> None:
    result = _program(tmp_path, "--quick", f"--json={tmp_path / 'rows.json'}")
    assert result.returncode == 0, result.stderr
    assert "A benchmark of nothing (--quick)" in result.stdout
    assert "missed" in result.stdout
    assert json.loads((tmp_path / "rows.json").read_text())[0]["met"] is False


def test_a_program_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    result = _program(tmp_path, f"--json={tmp_path}/nowhere/rows.json")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --json=")
    assert "Traceback" not in result.stderr


def test_what_was_measured_before_an_error_is_not_thrown_away(tmp_path: Path) -> None:
    text = PROGRAM.replace("target=0.5)", 'target=0.5)\n    run.row("quick", 1.0, "x")')
    (tmp_path / "rows.json").write_text("those of a whole run")
    result = _program(tmp_path, f"--json={tmp_path / 'rows.json'}", text=text)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the benchmark reports 'quick' twice")
    assert "Incomplete" in result.stdout
    partial = tmp_path / "rows.partial.json"
    assert f"the rows so far are in {partial}" in result.stdout
    assert [row["name"] for row in json.loads(partial.read_text())] == ["quick"]
    assert (tmp_path / "rows.json").read_text() == "those of a whole run"


def test_what_is_no_file_gets_the_rows_of_an_interrupted_run_itself(tmp_path: Path) -> None:
    run, out = _bench(json_path=os.devnull)
    run.row("figure", 1.0, "s")
    run.finish(complete=False)
    assert f"the rows so far are in {os.devnull}\n" in out.getvalue()
    run, _ = _bench(json_path=tmp_path / "rows")
    run.row("figure", 1.0, "s")
    run.finish(complete=False)
    assert os.listdir(tmp_path) == ["rows.partial.json"]


def test_settings_are_chosen_by_their_names_and_none_is_an_error() -> None:
    settings = ["vgg5 4g", "vgg5 wifi", "resnet18 4g"]
    assert harness.chosen(settings, "4g", str) == ["vgg5 4g", "resnet18 4g"]
    assert harness.chosen(settings, "", str) == settings
    with pytest.raises(ConfigError, match=r"--only='typo' .* vgg5 4g, vgg5 wifi, resnet18 4g"):
        harness.chosen(settings, "typo", str)


def test_the_example_in_the_docstring_runs(tmp_path: Path) -> None:
    lines = harness.__doc__.split("::\n", 1)[1].split("\nTimings end")[0].splitlines()
    code = "\n".join(line[4:] for line in lines)
    (tmp_path / "bench_sort.py").write_text(code)
    result = subprocess.run(
        [sys.executable, tmp_path / "bench_sort.py", "--quick"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )
    assert result.returncode == 0, result.stderr
    assert "reversed / sorted" in result.stdout
