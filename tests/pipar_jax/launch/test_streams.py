"""What a process does is not lost with whoever reads what it prints, and a full disk is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PROCESS_S
from tests.sources import ROOT

#: A binary that prints more than a pipe and a buffer hold, by print and by rich, and then works.
BINARY = """
import sys
from pipar_jax.launch.binary import begin, finish
from pipar_jax.report.console import make_console

(done,) = begin(list)

def work():
    for line in ("x" * 40_000, "y" * 40_000, "z" * 40_000):
        print(line, flush=True)
        make_console(80).print(line)
        print(line, file=sys.stderr)
    with open(done, "w") as file:
        file.write("worked")
    print("the end")

finish(work, debug=False)
"""


def run(*command: str, stdout: int, stderr: int) -> tuple[int, str, str]:
    """Runs Python; returns its exit code and what came from streams that are ``PIPE``."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, stdout=stdout, stderr=stderr, text=True, timeout=PROCESS_S,
    )  # fmt: skip
    return done.returncode, done.stdout or "", done.stderr or ""


@pytest.fixture
def without_reader() -> Iterator[int]:
    """The end of a pipe whose reader has ended, as ``head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    ("closed", "options"), [("out", ()), ("err", ()), ("both", ()), ("both", ("-u",))]
)
def test_work_goes_on_without_a_reader(
    closed: str, options: tuple[str, ...], without_reader: int, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    out, err = (
        without_reader if closed in (one, "both") else subprocess.PIPE for one in ("out", "err")
    )
    code, printed, said = run(*options, "-c", BINARY, str(done), stdout=out, stderr=err)
    assert (code, done.read_text()) == (0, "worked")
    if closed == "out":  # what the other stream says is all there
        assert [line[:1] for line in said.splitlines()] == ["x", "y", "z"]
    if closed == "err":
        assert printed.splitlines()[-1] == "the end"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("binary", [("-c", BINARY), ("-m", "experiments.command", "--version")])
def test_output_that_cannot_be_kept_is_an_error(binary: tuple[str, ...], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        code, _, said = run(
            *binary, str(tmp_path / "done"), stdout=full.fileno(), stderr=subprocess.PIPE
        )
    assert code == 1
    assert said.splitlines()[-1] == (
        "error: no space left on the disk while writing standard output: free some, or send it to "
        "another file"
    )


def test_the_help_may_be_cut_off(without_reader: int) -> None:
    code, _, said = run(
        "-m", "experiments.command", "--help", stdout=without_reader, stderr=subprocess.PIPE
    )
    assert (code, said) == (0, "")
