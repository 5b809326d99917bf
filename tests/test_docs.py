"""The code of the pages that newcomers copy runs, and says what the page says that it does."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs import digits
from pipar_jax.config import Config
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve
from tests.sources import ROOT

PAGE = ROOT / "docs" / "bring-your-model.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SAID = re.compile(r"^print\(.*\)  # (.*)$", re.M)


def test_the_network_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (block,) = [one for one in found if "stages.trace" in one]
    exec(block, {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines() == SAID.findall(block)


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    (tmp_path / "mynet.py").write_text(found[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    sys.modules.pop("mynet", None)
    return found


def test_the_page_runs_and_prints_what_it_says(
    blocks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(blocks) == 6
    exec("\n".join(blocks), {"__name__": "page"})
    said = SAID.findall("\n".join(blocks))
    printed = capsys.readouterr().out.splitlines()
    assert len(said) == len(printed) == 4
    for line, expected in zip(printed, said, strict=True):
        assert line.startswith(expected.removesuffix("…"))


def test_its_commands_work(blocks: list[str], tmp_path: Path) -> None:
    """Describes; training by the same flags is a test of the launcher's and of own models."""
    (command,) = re.findall(r"^pipar describe (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    arguments = [one.replace("'", "") for one in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", "from experiments.command import main; main()", "describe",
         *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "network, 922 parameters" in done.stdout and "left_right" in done.stdout
    assert "2 arrays are needed behind it" in done.stdout


def configured(text: str) -> Config:
    """Returns what the command of a page configures."""
    (command,) = re.findall(r"^pipar train (.*?)\n```$", text, re.M | re.S)
    config = digits.get_config()
    for flag in shlex.split(command.replace("\\\n", " "))[1:]:
        path, _, value = flag.removeprefix("--config.").partition("=")
        *groups, name = path.split(".")
        holder = functools.reduce(getattr, groups, config)
        setattr(holder, name, type(getattr(holder, name))(value))
    return config


def test_the_page_on_fine_tuning_fine_tunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
    (block,) = BLOCK.findall(text)
    monkeypatch.chdir(tmp_path)
    exec(block, {"__name__": "corpus"})
    config = configured(text)
    config.run.dir, config.epochs = str(tmp_path / "runs"), 4
    run = load(run_here(resolve(config), on_event=lambda event: None))
    perplexities = [
        row["metrics"]["perplexity"] for row in run.metrics if row["event"] == "evaluated"
    ]
    assert perplexities[-1] < 0.8 * perplexities[0]


def test_the_functions_of_the_page_on_optimisers_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    (block,) = BLOCK.findall(text)
    (tmp_path / "mytraining.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = configured(text)
    config.run.dir, config.epochs = str(tmp_path), 4
    config.data.train_samples, config.data.test_samples = 800, 100
    folder = run_here(resolve(config), on_event=lambda event: None)
    assert load(folder).score() > 0.3
    sys.modules.pop("mytraining")
