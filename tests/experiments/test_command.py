"""The command pipar: all binaries by their names, one dialect of exit codes, closed streams."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import command
from pipar_jax.config import Config, schema
from tests.patience import PROCESS_S
from tests.sources import ROOT, modules

NAMES = sorted(
    name.removeprefix("experiments.")
    for name, path in modules().items()
    if path.parent.name == "experiments" and path.name not in ("__init__.py", "command.py")
)
PIPAR = [sys.executable, "-m", "experiments.command"]


def pipar(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PIPAR, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S, **options
    )  # type: ignore[call-overload]


def test_every_binary_is_a_command_with_one_line_about_it() -> None:
    found = command.commands()
    assert sorted(found) == NAMES
    for name, text in found.items():
        assert text and "\n" not in text and len(text) < 120, name
        tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        # What parses the command line gives all of them the same codes, help and streams.
        assert calls & {"flags.run", "plain_flags.run", "harness.run"}, name
        assert not calls & {"app.run", "sys.exit"}, name
        about = ast.get_docstring(tree) or ""
        assert all(len(line) <= 100 for line in about.splitlines()), f"{name} --help is too wide"
    text = command.make_help()
    assert all(f"\n  {name} " in text for name in NAMES)


def test_the_users_folder_comes_last_and_ours_before_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (["", "/lib"], [str(tmp_path), "/lib"], ["/bin", "/lib"]):
        command.put_in_order(path)
        assert path[-2:] == [str(ROOT), str(tmp_path)]
        assert "" not in path and path.count(str(tmp_path)) == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "pipar needs a command"),
        (["trian"], "'trian' is not a command of pipar: did you mean 'train'?"),
        (["train", "--config=digits", "--config.epoch=3"], "did you mean '--config.epochs'?"),
        (["train", "--flagfile=/no/such/file"], "--flagfile cannot be read"),
        (["train", f"--config={'a' * 300}"], "is not a preset"),
        (["a" * 300], "is not a command of pipar"),
        (["report", "--outptu=x"], "did you mean '--output'?"),
        (["report", "/no/such/run"], "/no/such/run is not the folder of a run"),
        (["plan_chain", "--profile=/no/such/file", "--layers=1:2"], "is not a profile table"),
        (["make-certificates", "x"], "unexpected argument 'x'"),
        (["plan_chain"], "--profile and --layers are missing (what to give: --help)"),
        (["node", "--config=digits", "--index=1", "--server=a:1"], "has no compute nodes"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = pipar(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_flags_come_from_a_file_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "flags").write_text("# a comment\n--config=digits\n--config.epochs=7\n")
    done = pipar("describe", f"--flagfile={tmp_path / 'flags'}", "--help")
    assert done.returncode == 0 and "--config.epochs=7" in done.stdout, done.stderr
    assert "usage: pipar describe" in done.stdout


CLOSED = """
import os, sys
for number in (0, 1, 2):
    if str(number) in sys.argv[1]:
        os.close(number)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def with_closed(numbers: str, *arguments: str) -> int:
    """Runs Python with standard streams closed; returns its exit code."""
    return subprocess.run(
        [sys.executable, "-c", CLOSED, numbers, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PROCESS_S,
    ).returncode


@pytest.mark.soak
def test_a_run_does_not_need_standard_streams(tmp_path: pathlib.Path) -> None:
    small = ["--config.model.name=mlp", "--config.epochs=1", "--config.data.train_samples=64"]
    arguments = ["-m", "experiments.train", "--config=digits", *small]
    assert with_closed("012", *arguments, f"--config.run.dir={tmp_path}") == 0
    assert (tmp_path / "digits" / "weights.safetensors").is_file()


STREAMS = """
import os, sys
from pipar_jax.launch.streams import open_streams
open_streams()
for number in range(3):
    os.fstat(number)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    print("out"), print("error", file=sys.stderr), sys.stdin.read()
    sys.stdout.flush(), sys.stderr.flush()
assert os.path.getsize(sys.argv[1]) == 0
"""


@pytest.mark.parametrize("numbers", ["", "0", "1", "2", "12", "012"])
def test_closed_streams_are_opened_on_nothing(numbers: str, tmp_path: pathlib.Path) -> None:
    assert with_closed(numbers, "-c", STREAMS, str(tmp_path / "file")) == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_and_a_version_and_needs_no_streams(name: str) -> None:
    shown = pipar(name, "--help")
    assert all(len(line) <= 100 for line in shown.stdout.splitlines())
    assert shown.returncode == 0 and f"usage: pipar {name}" in shown.stdout, shown.stderr
    assert pipar(name, "--version").stdout.startswith("pipar ")
    for numbers in ("0", "1", "2", "012"):
        assert with_closed(numbers, "-m", "experiments.command", name, "--help") == 0
    assert pipar(name, "--no-such-flag=1").returncode == 2
    for target, code in (("| head -c 1", 0), ("> /dev/full", 1)):
        line = f"set -o pipefail; '{sys.executable}' -m experiments.command {name} --help {target}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_platform_that_is_not_there_is_one_line_with_field_and_remedy(
    platform: str, tmp_path: pathlib.Path
) -> None:
    if pathlib.Path("/dev/nvidiactl").exists() or "TPU_NAME" in os.environ:
        pytest.skip("this machine has one")
    flags = [f"--config.server.platform={platform}", f"--config.run.dir={tmp_path}"]
    done = pipar("train", "--config=digits", *flags)
    assert done.returncode == 2, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error:")]
    assert f"server.platform={platform!r}" in line and "--config.server.platform=cpu" in line
    assert "Traceback" not in done.stderr


def test_each_host_has_a_platform_of_its_own() -> None:
    fields = [one.path for one in schema.options(Config) if one.path.endswith(".platform")]
    assert fields == ["devices.defaults.platform", "nodes.defaults.platform", "server.platform"]
