"""What the predictor is compared with is exact where its assumption holds."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.latency_data import baselines
from experiments.latency_data.evaluation import score
from tests.pipar_jax.profiling.predictor import synthetic


@pytest.fixture(scope="module")
def layers():
    return [one.operators for one in synthetic.layers()[:30]]


def test_a_ratio_is_exact_for_devices_that_differ_by_one():
    reference = np.array([1.0, 2.0, 5.0, 7.0])
    found = baselines.scalar_ratio(3 * reference[:2], reference[:2], reference)
    assert found == pytest.approx(3 * reference)
    nothing = np.array([np.nan, np.nan])
    assert np.isnan(baselines.scalar_ratio(nothing, reference[:2], reference)).all()


def test_a_regression_is_exact_where_time_is_linear(layers):
    times = np.array([1e-4 + 1e-10 * t[:, 1].sum() + 2e-9 * t[:, 2:5].sum() for t in layers])
    times[3] = np.nan
    found = baselines.flops_regression(layers, times, layers[4:])
    assert found == pytest.approx(times[4:], rel=1e-6)


def test_a_regression_predicts_no_negative_time(layers):
    times = np.array([1e-3] * len(layers)) / np.arange(1, len(layers) + 1)
    assert (baselines.flops_regression(layers, times, layers) >= times.min()).all()


def test_a_look_up_knows_what_it_saw(layers):
    times = np.arange(1.0, len(layers) + 1)
    chosen = [i for i, table in enumerate(layers) if len(table) > 1]
    distinct = {layers[i].tobytes(): i for i in chosen}
    index = list(distinct.values())
    found = baselines.look_up([layers[i] for i in index], times[index], [layers[i] for i in index])
    assert np.median(np.abs(found / times[index] - 1)) < 1e-9


def test_scores_count_what_is_known():
    found = score([1.0, 1.05, 0.8, np.nan])
    assert found.predictions == 3
    assert found.mape == pytest.approx((0 + 0.05 + 0.2) / 3)
    assert found.within == pytest.approx(2 / 3)
    assert np.isnan(score([]).mape)
