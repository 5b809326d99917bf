"""What `experiments.bench_rounds` is made of, but for Flower itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import stages
from experiments.benchmarks import flower_app, process_memory, round_model


@pytest.mark.parametrize("megabytes", [0.4, 4.0])
def test_the_network_has_the_weights_that_are_asked_for_and_each_has_a_gradient(megabytes):
    example = jax.ShapeDtypeStruct((1, 8), np.float32)
    model = stages.trace(round_model.build(2, megabytes=megabytes), example, whole=True)
    assert 4 * stages.parameter_count(model) == pytest.approx(megabytes * 1e6, rel=0.01)
    params, state = model.init(0)
    (stage,) = stages.split(model)
    x, labels = np.eye(2, 8, dtype=np.float32), np.arange(2, dtype=np.int32)
    _, _, gradient, _ = stage.loss(params, state, x, labels, stages.make_draw(2), None)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient))


def test_flowers_app_is_whole(tmp_path: Path):
    flower_app.write(tmp_path / "app")
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    for component in project["tool"]["flwr"]["app"]["components"].values():
        module, _, name = component.partition(":")
        path = tmp_path / "app" / f"{module.replace('.', '/')}.py"
        assigned = [
            target.id
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        assert name in assigned


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_memory_is_that_of_children_and_their_children():
    held = "import sys; block = bytearray(50_000_000); print(flush=True); sys.stdin.read()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with (
        process_memory.sampled(os.getpid()) as peak,
        subprocess.Popen(
            [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
    ):
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        until_s = time.monotonic() + 60
        while peak.nbytes < 50_000_000 and time.monotonic() < until_s:
            time.sleep(0.05)
        child.stdin.close()
    assert peak.nbytes > 50_000_000
