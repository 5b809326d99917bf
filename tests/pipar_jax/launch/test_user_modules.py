"""Functions of the user's are found in their source, without importing it."""

from __future__ import annotations

import pathlib
import sys
import textwrap
import types
import zipfile

import pytest

from pipar_jax.errors import ConfigError
from pipar_jax.launch.user_modules import check_function

MODULE = """
raise RuntimeError("imported")
import os.path as alias
from json import loads, dumps as written
def plain(): pass
async def waiting(): pass
class Net: pass
anonymous = lambda: None
first, *rest = plain, waiting
typed: object = plain
if True:
    def conditional(): pass
try:
    from fast import quick
except ImportError:
    def slow(): pass
def init():
    global late
    def inner(): pass
    local = 1
"""
BOUND = ("alias", "loads", "written", "plain", "waiting", "Net", "anonymous", "first", "rest",
         "typed", "conditional", "quick", "slow", "late")  # fmt: skip


@pytest.fixture
def write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(text: str) -> str:
        (tmp_path / "users_source.py").write_text(textwrap.dedent(text), encoding="utf-8")
        return "users_source"

    return module


def check(module: str, function: str) -> None:
    check_function(f"{module}:{function}", "stop.when", module, function)


def test_every_name_that_a_module_binds_is_found_and_no_other(write) -> None:
    module = write(MODULE)
    for name in BOUND:
        check(module, name)
    for name in ("plan", "inner", "local", "os", "json", "dumps"):
        with pytest.raises(ConfigError, match=rf"module 'users_source' .* has no '{name}'"):
            check(module, name)


@pytest.mark.parametrize(
    "text",
    ["from json import *", "def __getattr__(name): return print", "globals()['f'] = print",
     "exec('def f(): pass')", "def make():\n    globals()['f'] = print\nmake()"],
)  # fmt: skip
def test_a_module_that_may_have_any_name_is_left_to_its_host(write, text: str) -> None:
    check(write(text), "f")


def test_a_module_that_is_not_python_is_told_with_its_line(write) -> None:
    with pytest.raises(ConfigError, match=r"users_source\.py, line 3 is not valid Python: "):
        check(write("a = 1\n\ndef f(:\n"), "f")


def test_modules_without_a_source_and_missing_ones() -> None:
    check("math", "anything")
    check("sys", "anything")
    for module in ("no_such_module", "json.no_such", "math.no_such"):
        with pytest.raises(ConfigError, match=rf"there is no module '{module}'"):
            check(module, "f")


def test_a_module_of_this_process_alone_and_one_in_an_archive_are_left_to_their_host(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "users_notebook", types.ModuleType("users_notebook"))
    check("users_notebook", "f")
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    check("__main__", "f")
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("users_archived.py", "def f(): pass\n")
    monkeypatch.syspath_prepend(str(archive))
    check("users_archived", "f")
