"""The choice of a formulation: measured, platform-bound, and forceable."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest

from stages.layers import choice, measure, measured
from stages.layers.choice import Formulation, choose, fastest, forced


def test_the_nearest_measured_shape_decides():
    shape = (25, 2, 2, 512, 512, 3, 1)
    times = dict(measured.TABLE["conv_forward"])[shape]
    # XLA falls into a naive loop there, two orders of magnitude slower.
    assert times["xla"] > 5 * times["patches"]
    assert fastest("conv_forward", (30, 2, 2, 480, 500, 3, 1)) is Formulation.PATCHES
    assert fastest("depthwise", (100, 16, 16, 384, 384, 3, 1)) is Formulation.DIRECT
    assert fastest("max_pool", (100, 32, 32, 32, 32, 2, 2)) is Formulation.DIRECT


@pytest.mark.parametrize("operation", sorted(measured.TABLE))
def test_every_measured_shape_gets_what_was_fastest_for_it(operation):
    for shape, times in measured.TABLE[operation]:
        assert times[fastest(operation, shape).value] == min(times.values())


def test_other_platforms_always_use_xla(monkeypatch):
    shape = (25, 2, 2, 512, 512, 3, 1)
    assert choose("conv_forward", shape) is Formulation.PATCHES
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("conv_forward", shape) is Formulation.XLA


def test_a_choice_can_be_forced_and_is_restored():
    shape = (25, 2, 2, 512, 512, 3, 1)
    with forced(Formulation.XLA):
        assert choose("conv_forward", shape) is Formulation.XLA
        with forced(None):
            assert choose("conv_forward", shape) is Formulation.PATCHES
    assert choose("conv_forward", shape) is Formulation.PATCHES


def test_measuring_writes_a_table_that_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CONVOLUTIONS", ((4, 3, 2, 3, 2),))
    monkeypatch.setattr(measure, "DEPTHWISE", ((4, 3, 3, 1),))
    monkeypatch.setattr(measure, "POOLS", ((4, 3, 2, 2),))
    monkeypatch.setattr(measure, "BATCHES", (2,))
    path = tmp_path / "table.py"
    measure.write(measure.measure_all(), path)
    spec = importlib.util.spec_from_file_location("table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.TABLE) == set(measured.TABLE)
    ((shape, times),) = module.TABLE["conv_input"]
    assert shape == (2, 4, 4, 3, 2, 3, 2)
    assert set(times) == {"xla", "patches"}
    assert all(np.isfinite(value) and value > 0 for value in times.values())
    assert choice.WEIGHTS[-1] > 1
