"""The weights of a run in Flax's form: where they go, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import serialization

from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.disk.files import write_tensors
from tests.patience import PROCESS_S
from tests.sources import ROOT


def export(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip


def test_the_file_is_named_after_the_run_and_replaces_none(tmp_path: Path) -> None:
    (run := tmp_path / "runs" / "net-1.5").mkdir(parents=True)
    write_tensors(run / WEIGHTS, {"unit/kernel": np.ones(2, np.float32)}, {})
    (tmp_path / "net-1.5.msgpack").write_text("of another run")
    done = export(tmp_path, "runs/net-1.5")
    assert done.stdout == "wrote 1 units to net-1.5-2.msgpack\n", done.stderr
    tree = serialization.msgpack_restore((tmp_path / "net-1.5-2.msgpack").read_bytes())
    assert tree["unit"]["kernel"].tolist() == [1.0, 1.0]
    assert (tmp_path / "net-1.5.msgpack").read_text() == "of another run"


def test_what_cannot_be_read_or_written_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_text("x")
    for arguments, says in (
        (["nothing"], "nothing is not there: name the folder of a run"),
        (["damaged.safetensors"], "damaged.safetensors"),
        (["nothing", "--output=no/a.msgpack"], "--output=no/a.msgpack: the folder "),
    ):
        done = export(tmp_path, *arguments)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["damaged.safetensors"]
