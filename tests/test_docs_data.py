"""The page on data: its commands train what it shows, by every method that it names."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import digits
from pipar_jax.config import Config
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import Run, load_configured
from pipar_jax.methods.resolution import resolve
from tests.sources import ROOT
from tests.test_docs import BLOCK

DOCS = ROOT / "docs"
PAGE = (DOCS / "bring-your-data.md").read_text(encoding="utf-8")
COMMANDS = [
    command.replace("\\\n", " ")
    for command in re.findall(r"^pipar train ((?:.*\\\n)*.*)$", PAGE, re.M)
]
#: For each command the score that its first method has to reach, and the share of a start that
#: learns nothing: of the spread, of a coin, of a third, of a tenth.
REACHED = {"numbers": ("rmse", 0.5), "yes_or_no": ("accuracy", 0.8), "sequences": ("accuracy", 0.9),
           "mynet": ("accuracy", 0.7)}  # fmt: skip
METHODS = ("pipar", "fl", "sl", "sfl", "mpsl")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    model = (DOCS / "bring-your-model.md").read_text(encoding="utf-8")
    (tmp_path / "mydata.py").write_text(BLOCK.findall(PAGE)[0], encoding="utf-8")
    (tmp_path / "mynet.py").write_text(BLOCK.findall(model)[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in ("mydata", "mynet"):
        sys.modules.pop(name, None)


def configured(command: str, folder: Path, method: str) -> Config:
    """Returns what a command of the page configures, for a method."""
    config = digits.get_config()
    for flag in command.split()[1:]:
        field, _, value = flag.partition("=")
        _, group, name = field.split(".")
        kind = type(getattr(getattr(config, group), name))
        setattr(getattr(config, group), name, kind(value))
    config.run.dir, config.method, config.epochs = str(folder), method, 8
    config.data.train_samples = 400 if config.data.source == "digits" else 0
    config.data.test_samples = 200 if config.data.source == "digits" else 0
    config.run.evaluate_every = 8
    if method == "mpsl":
        config.nodes.count, config.pipeline.cuts = 1, "1,2"
    return config


def train(config: Config) -> Run:
    resolved = resolve(config)
    return load_configured(resolved, run_here(resolved, on_event=lambda event: None), None)


def chosen() -> list:
    """Every problem by every method, of which `make test` trains each problem by one."""
    return [
        pytest.param(name, method, marks=[pytest.mark.soak] * (METHODS[place % 5] != method))
        for place, name in enumerate(REACHED)
        for method in METHODS
    ]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("name", "method"), chosen())
def test_a_foreign_problem_is_learned(name: str, method: str, tmp_path: Path) -> None:
    (command,) = [one for one in COMMANDS if f":{name}" in one]
    run = train(configured(command, tmp_path, method))
    score, bound = REACHED[name]
    reached = run.score(score)
    assert reached < bound if score == "rmse" else reached > bound
