"""Measures of what others can tell: against their formulas written out, and on known cases."""

from __future__ import annotations

import numpy as np
import pytest

from pipar_jax.privacy.leakage import (
    distance_correlation,
    squared_error,
    structural_similarity,
)


@pytest.fixture
def random():
    return np.random.default_rng(5)


def similarity_of_windows(a, b, side=7):
    """Return the mean index over all windows of an image of one channel, one by one."""
    found = []
    for top in range(a.shape[0] - side + 1):
        for left in range(a.shape[1] - side + 1):
            x = a[top : top + side, left : left + side].ravel()
            y = b[top : top + side, left : left + side].ravel()
            covariance = np.cov(x, y)
            luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
            structure = (2 * covariance[0, 1] + 9e-4) / (np.trace(covariance) + 9e-4)
            found.append(luminance * structure)
    return np.mean(found)


def test_similarity_equals_its_formula(random):
    a, b = random.random((2, 3, 9, 11, 2))
    expected = [
        np.mean([similarity_of_windows(x[..., c], y[..., c]) for c in range(2)])
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(structural_similarity(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(structural_similarity(a, a), 1)
    flat = np.full((1, 5, 5, 1), 0.5)  # smaller than a window
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    np.testing.assert_allclose(structural_similarity(flat, flat / 2), expected)
    assert structural_similarity(a, 1 - a).max() < 0


def test_the_error_is_of_each_image(random):
    a = random.random((2, 4, 4, 1), np.float32)
    b = a + np.array([0.5, 0.25], np.float32).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(squared_error(a, b), [0.25, 0.0625], rtol=1e-5)


def correlation_written_out(x, y):
    """Return the bias-corrected squared distance correlation by its definition."""
    n = len(x)

    def centred(z):
        d = [[np.linalg.norm(z[i] - z[j]) for j in range(n)] for i in range(n)]
        total = sum(map(sum, d))
        return [
            [
                d[i][j] - sum(d[i]) / (n - 2) - sum(d[k][j] for k in range(n)) / (n - 2)
                + total / ((n - 1) * (n - 2)) if i != j else 0.0
                for j in range(n)
            ]
            for i in range(n)
        ]  # fmt: skip

    a, b = np.array(centred(x)), np.array(centred(y))

    def product(u, v):
        return np.sum(u * v) / (n * (n - 3))

    return product(a, b) / np.sqrt(product(a, a) * product(b, b))


def test_distance_correlation_equals_its_formula(random):
    x = random.normal(size=(9, 3))
    y = np.tanh(x @ random.normal(size=(3, 4))) + random.normal(size=(9, 4))
    assert distance_correlation(x, y) == pytest.approx(correlation_written_out(x, y), rel=1e-9)


def test_distance_correlation_of_equal_and_of_independent_samples(random):
    x = random.normal(size=(200, 8, 8)).astype(np.float32)
    assert distance_correlation(x, x) == pytest.approx(1)
    assert distance_correlation(x, 3 - 2 * x[:, ::-1]) == pytest.approx(1)
    # Of many numbers, where the plain one is near 1.
    found = [distance_correlation(x, random.normal(size=(200, 500))) for _ in range(20)]
    assert abs(np.mean(found)) < 0.01 and np.max(np.abs(found)) < 0.05
    assert distance_correlation(x, np.ones((200, 3), np.float32)) == 0
    # Not linear, and not found by a correlation.
    assert distance_correlation(x[:, 0, :1], x[:, 0, :1] ** 2) > 0.1
    with pytest.raises(ValueError, match="needs 4 samples, not 3"):
        distance_correlation(x[:3], x[:3])
