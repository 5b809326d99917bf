"""A host's profile by prediction has the form of a measured one, and the same facts."""

from __future__ import annotations

import dataclasses

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling import unit_times
from pipar_jax.profiling.predictor.latency_model import SHIPPED, load
from pipar_jax.profiling.predictor.reference import (
    BATCH,
    ReferenceTimes,
    reference_layers,
    reference_model,
)
from tests.pipar_jax.profiling.predictor import synthetic
from tests.pipar_jax.runtime import support

SIZES = (2, 8)


def reference(factor: float = 1.0) -> ReferenceTimes:
    law, tables = synthetic.Law(3), reference_layers()
    sizes = [1e3 * 4**i for i in range(len(tables))]
    return ReferenceTimes(
        tuple(law.forward_s(table) for table in tables),
        tuple(law.backward_s(table) for table in tables),
        tuple(1e-5 + 1e-10 * size for size in sizes), tuple(sizes), law.call_s, 1e-9,
    ).slowed(factor)  # fmt: skip


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Config:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Config()
    made.model.name, made.model.norm = "mlp", "group"
    return resolve(made)


def test_a_prediction_has_a_time_for_every_unit_and_size(settings):
    network = support.model(dtype="float32")
    predicted = unit_times.predicted_host(settings, network, SIZES, reference())
    assert [one.name for one in predicted.units] == list(network.unit_names)
    assert predicted.host.sizes == SIZES
    assert predicted.host.forward_s[-1] == (0.0, 0.0)
    rows = (*predicted.host.forward_s[:-1], *predicted.host.backward_s)
    assert all(seconds > 0 for row in rows for seconds in row)
    assert all(seconds > 0 for seconds in predicted.host.update_s)


def test_a_slower_device_is_predicted_to_be_slower(settings):
    network = support.model(dtype="float32")
    quick, slow = (
        unit_times.predicted_host(settings, network, SIZES, reference(factor)).host
        for factor in (1.0, 10.0)
    )
    for mine, theirs in zip(slow.backward_s, quick.backward_s, strict=True):
        assert mine[0] / theirs[0] == pytest.approx(10, rel=0.15)
    assert slow.update_s == pytest.approx([10 * seconds for seconds in quick.update_s])
    assert slow.call_s == pytest.approx(10 * quick.call_s)


def test_times_of_reference_layers_survive_the_wire_and_nothing_else_does():
    made = reference()
    assert ReferenceTimes.from_dict(made.to_dict()) == made
    for change, message in (
        ({"forward_s": made.forward_s[:-1]}, "reference layers, got"),
        ({"backward_s": (0.0,) * len(made.backward_s)}, "must be from 1e-09 to"),
        ({"forward_s": (1e10,) * len(made.forward_s)}, "must be from 1e-09 to"),
        ({"parameter_bytes": (0.0,) * len(made.forward_s)}, "a byte at least"),
        ({"update_s": "often"}, "not the times"),
        ({"nonsense": 1.0}, "not the times"),
    ):
        with pytest.raises(PlanError, match=message):
            ReferenceTimes.from_dict(made.to_dict() | change)


def test_the_reference_layers_differ_and_their_work_is_small():
    tables = reference_layers()
    assert len(tables) == len(reference_model().units) - 1 >= 10
    assert sum(table[:, 1].sum() for table in tables) < 1.5e9
    assert all(table[table[:, 0] == 1][:, 5].max(initial=BATCH) == BATCH for table in tables)


def test_the_shipped_network_is_small_and_says_how_it_was_made():
    assert SHIPPED.stat().st_size < 16_000
    assert "layers on" in load().about


def test_only_what_the_network_was_trained_on_is_predicted():
    made = Config()
    made.tuner.times, made.model.dtype = "predicted", "float64"
    with pytest.raises(ConfigError, match="supports float32 only"):
        resolve(made)
    assert dataclasses.replace(Config().tuner).times == "profiled"
