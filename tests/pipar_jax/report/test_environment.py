"""environment.json: where a run was started, and no secret in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipar_jax
from pipar_jax.config import Config
from pipar_jax.launch.run_folders import hold_folder
from pipar_jax.methods.resolution import resolve
from pipar_jax.report import environment
from tests.sources import ROOT

SECRET = "a-long-secret"


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--config.network.token={SECRET}"],
        [f"-config.network.token={SECRET}"],
        ["--config.network.token", SECRET],
        [f"--config.network.token={SECRET}", "--config.network.token", SECRET],
        [f"--api_password={SECRET}"],
        ["--Passphrase", SECRET],
        [f"--config.name=run-{SECRET}"],
    ],
)
def test_no_way_to_write_a_secret_is_recorded(arguments: list[str]) -> None:
    hidden = environment.hide(["python", *arguments, "--config.epochs=3"], SECRET)
    assert SECRET not in " ".join(hidden) and hidden[-1] == "--config.epochs=3"
    assert "(hidden)" in " ".join(hidden)
    if "name" not in arguments[0]:  # by the flag alone, if the secret is another one
        assert SECRET not in " ".join(environment.hide(arguments, None))


def test_where_a_secret_is_kept_is_none() -> None:
    plain = ["--config.network.token=env:NAME", "--config.network.token", "file:PATH", "--token",
             "--config.epochs=3"]  # fmt: skip
    assert environment.hide(plain, None) == plain


def test_a_runs_folder_says_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "x", f"--config.network.token={SECRET}"])
    config = resolve(Config())
    config.run.dir, config.network.token = str(tmp_path), SECRET
    with hold_folder(config) as held:
        folder = held.path
    environment.add_platform(folder)
    text = (folder / "environment.json").read_text()
    found = json.loads(text)
    assert SECRET not in text and found["command"].endswith("token=(hidden)'")
    assert found["pipar_jax"] == pipar_jax.__version__ and found["libraries"]["jax"]
    assert found["host"] and found["date"].endswith("+00:00") and found["python"]
    assert found["server"]["platform"] == "cpu" and found["server"]["devices"]
    assert found["commit"] == environment.commit(ROOT)


def test_the_commit_of_sources(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) is None
    (tmp_path / ".git").mkdir()  # no repository, whatever it looks like
    assert environment.commit(tmp_path) is None
    (tmp_path / ".git").rmdir()
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        (tmp_path / "file").write_text("1")
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    found = environment.commit(tmp_path)
    assert found is not None and len(found) == 40
    (tmp_path / "file").write_text("2")
    assert environment.commit(tmp_path) == f"{found}-dirty"
