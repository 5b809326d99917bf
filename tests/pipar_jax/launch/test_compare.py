"""Comparing methods, as the launcher does it: what is checked before the runs, and the page."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs import digits
from pipar_jax.config import Config
from pipar_jax.errors import ConfigError
from pipar_jax.launch import compare
from pipar_jax.methods.registry import server_methods
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.comparison import Outcome, setting_of
from stages import make_task


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
    with pytest.raises(ConfigError, match=f"^name='{config.name}-.*at most 100"):
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
