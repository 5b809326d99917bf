"""Flags of binaries without a configuration: what is checked while the command line is read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from pipar_jax.errors import ConfigError, DataError, DiskError, PlanError, RunError
from pipar_jax.launch.binary import wrong_use
from pipar_jax.launch.plain_flags import as_path, define_folder, list_of, one_of, positive
from tests.patience import PROCESS_S
from tests.sources import ROOT


def test_names_are_taken_out_of_those_that_there_are() -> None:
    read = list_of(one_of(["vgg5", "resnet18"]), once=True)
    assert read("resnet18, vgg5,resnet18") == ["resnet18", "vgg5"]
    with pytest.raises(ValueError, match=r"'vgg' is not known: did you mean 'vgg5'\? \(known: "):
        read("vgg5,vgg")
    with pytest.raises(ValueError, match="'' is not known"):
        read("")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "x", "", "2.5"])
def test_numbers_are_finite_and_above_0(text: str) -> None:
    with pytest.raises(ValueError, match=f"^'{text}' is not a whole number above 0$"):
        positive(int)(text)
    if text != "2.5":
        with pytest.raises(ValueError, match=f"^'{text}' is not a number above 0$"):
            positive(float)(text)


def test_numbers_that_are_repeated_count_as_often_unless_once_is_enough() -> None:
    assert list_of(positive(float))("1,2.5,2.5") == [1.0, 2.5, 2.5]
    assert list_of(positive(int), once=True)("8,2,8") == [8, 2]


def test_the_home_of_somebody_unknown_is_an_error_of_the_command_line(tmp_path: Path) -> None:
    assert as_path(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="'~no-such-user/x' is not a path"):
        as_path("~no-such-user/x")


@pytest.mark.parametrize("kind", [DataError, PlanError, RunError])
def test_what_the_command_line_names_is_its_error(kind: type[Exception]) -> None:
    with pytest.raises(ConfigError, match=r"^no such file$"), wrong_use():
        raise kind("no such file")


def test_a_disk_that_is_full_is_no_error_of_the_command_line() -> None:
    with pytest.raises(DiskError), wrong_use():
        raise DiskError("no space left")


def test_an_error_of_the_system_while_the_command_line_is_read_is_one_line() -> None:
    code = "from pipar_jax.launch.binary import begin; begin(lambda arguments: open('/no/such'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S
    )
    assert done.returncode == 2
    assert done.stderr == "error: No such file or directory: /no/such\n"


BENCHMARKS = sorted(path.stem for path in (ROOT / "experiments").glob("bench_*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_list_of_a_benchmark_is_checked_before_it_measures(name: str) -> None:
    """``DEFINE_list`` takes any texts: ``plain_flags.define`` reads them with what there is."""
    tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call.endswith("DEFINE_list")]


def test_a_flag_of_a_folder_reads_it_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    read = {}
    for exists in (False, True):
        define_folder(name := f"folder_of_a_test_{exists}", "A folder.", exists=exists)
        read[exists] = absl_flags.FLAGS[name]
        delattr(absl_flags.FLAGS, name)
    for flag in read.values():
        assert flag.value == ""
        flag.parse("~")
        assert flag.value == str(tmp_path)
        with pytest.raises(absl_flags.Error, match="file is a file: name a folder"):
            flag.parse("~/file")
        with pytest.raises(absl_flags.Error, match="no-such-user"):
            flag.parse("~no-such-user")
    read[False].parse("~/new")
    assert read[False].value == f"{tmp_path}/new"
    with pytest.raises(absl_flags.Error, match=f"there is no folder {tmp_path}/new"):
        read[True].parse("~/new")
