"""Comparing methods, as the launcher does it: what is checked before the runs, and the page."""

from __future__ import annotations

import ast
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs import digits
from pipar_jax.config import Config
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch import compare
from pipar_jax.methods.registry import server_methods
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.comparison import Outcome, setting_of
from stages import make_task
from tests.sources import ROOT, modules


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = digits.get_config()
    made.run.dir = str(tmp_path / "runs")
    return made


def test_the_names_of_the_runs_are_checked_before_the_first_one(config: Config) -> None:
    methods = server_methods()
    longest = max(map(len, methods))
    config.name = "n" * (100 - len("-") - longest)
    compare.check(resolve(config), methods)
    config.name += "n"  # a valid name, unless the longest method comes behind it
    with pytest.raises(ConfigError, match=f": name='{config.name}-.*at most 100"):
        compare.check(resolve(config), methods)


def test_a_folder_that_cannot_be_made_is_told_before_the_first_run(config: Config) -> None:
    Path(config.run.dir).touch()
    config.run.dir += "/below"
    with pytest.raises(ConfigError, match=r"^run\.dir=.*Not a directory"):
        compare.check(resolve(config), ["fl"])


def test_the_page_of_a_second_comparison_leaves_that_of_the_first(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir(config.run.dir)

    def run_method(config: Config, method: str, *_: Any) -> Outcome:
        folder = Path(config.run.dir) / setting_of(config, method).name
        return Outcome(method, "", 1.0, make_task().facts(), 0.5, 0.0, 0.0, 0, 0, str(folder))

    def write_report(folders: list[Path], target: Path) -> None:
        assert [folder.name for folder in folders] == ["digits-fl"]
        target.touch(exist_ok=False)

    monkeypatch.setattr(compare.comparison, "run_method", run_method)
    monkeypatch.setattr(compare, "write_report", write_report)
    for page in ("digits.html", "digits-2.html"):
        console = Console(file=io.StringIO(), width=500)
        compare.compare(config, ["fl"], console)
        assert f"Open {config.run.dir}/{page} in a browser" in console.file.getvalue()
    assert sorted(os.listdir(config.run.dir)) == ["digits-2.html", "digits.html"]


def outcome_of(config: Config, method: str, task: dict[str, Any] | None = None) -> Outcome:
    folder = Path(config.run.dir) / setting_of(config, method).name
    return Outcome(method, "", 1.0, task or make_task().facts(), 0.5, 0.0, 0.0, 0, 0, str(folder))


@pytest.mark.parametrize("error", [RunError("d1 is gone"), KeyboardInterrupt()])
def test_methods_before_one_that_fails_have_their_table_and_page(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def run_method(config: Config, method: str, *_: Any) -> Outcome:
        if method == "sfl":
            raise error
        return outcome_of(config, method)

    os.mkdir(config.run.dir)
    pages: list[list[str]] = []
    monkeypatch.setattr(compare.comparison, "run_method", run_method)
    monkeypatch.setattr(
        compare, "write_report", lambda folders, _: pages.append([one.name for one in folders])
    )
    console = Console(file=io.StringIO(), width=500)
    with pytest.raises(type(error)):
        compare.compare(config, ["fl", "sl", "sfl", "pipar"], console)
    text = console.file.getvalue()
    assert pages == [["digits-fl", "digits-sl"]]
    assert re.search(r"^ *FL .*\n *SL ", text, re.M) and "2 of 4 methods. Open " in text
    pages.clear()
    with pytest.raises(type(error)):  # there is nothing to show
        compare.compare(config, ["sfl", "fl"], console)
    assert not pages


def test_names_with_brackets_are_shown_as_they_are(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir(config.run.dir)
    facts = make_task().facts()
    task = {**facts, "main": "rate[/a]", "scores": {"rate[/a]": facts["scores"][facts["main"]]}}
    config.name = "x[a]"
    monkeypatch.setattr(
        compare.comparison, "run_method", lambda *given: outcome_of(given[0], given[1], task)
    )
    monkeypatch.setattr(compare, "write_report", lambda folders, target: None)
    console = Console(file=io.StringIO(), width=500)
    compare.compare(config, ["fl"], console)
    text = console.file.getvalue()
    assert text.count("rate[/a]") == 3 and f"{config.run.dir}/x[a].html" in text


def test_a_method_that_does_not_fit_is_named_with_its_flag(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"^with method mpsl of --methods: method=mpsl "):
        compare.check(resolve(config), ["fl", "mpsl"])


@pytest.mark.parametrize("package", ["pipar_jax", "experiments"])
def test_no_console_takes_names_for_markup(package: str) -> None:
    """Each is made where it is told so, or has what it prints marked as text."""
    for name, path in modules().items():
        if name.split(".")[0] != package:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Console":
                assert "markup=False" in ast.unparse(node), f"{path}:{node.lineno}"
