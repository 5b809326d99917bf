"""The cost of Gaussian releases: published values, and a library as oracle where it is there."""

from __future__ import annotations

import importlib.util
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipar_jax.errors import ConfigError
from pipar_jax.privacy import accountant
from pipar_jax.privacy.accountant import (
    gaussian_delta,
    gaussian_epsilon,
    keep_probability,
    noise_beside_quantile,
    noise_for,
    release_cost,
    renyi_epsilon,
    spent_for,
)

DELTA = 1e-5
LIBRARY = importlib.util.find_spec("dp_accounting") is not None
needs_library = pytest.mark.skipif(not LIBRARY, reason="dp-accounting is not installed")

# Multiplier against a sensitivity of 1, releases, epsilon by Renyi divergences and the exact one.
GOLDEN = (
    (1, 1, 4.7285, 4.3772),
    (2, 10, 8.0794, 7.5113),
    (5, 10, 2.8137, 2.5944),
    (10, 10, 1.3085, 1.1994),
)


@pytest.mark.parametrize(("noise", "times", "renyi", "exact"), GOLDEN)
def test_golden_values(noise, times, renyi, exact):
    spent = times / noise**2
    assert renyi_epsilon(spent, DELTA) == pytest.approx(renyi, abs=5e-5)
    assert gaussian_epsilon(spent, DELTA) == pytest.approx(exact, abs=5e-5)


@pytest.mark.parametrize(("times", "epsilon"), [(10, 7.51), (11, 7.96), (15, 9.61)])
def test_repeated_releases_count(times, epsilon):
    assert gaussian_epsilon(times / 4, DELTA) == pytest.approx(epsilon, abs=5e-3)


@pytest.mark.parametrize(
    ("epsilon", "times", "noise"),
    [(1, 1, 2 * 3.730632), (8, 1, 2 * 0.60023), (8, 1, 1.2005), (8, 10, 3.7962)],
)
def test_golden_noise_against_another_record(epsilon, times, noise):
    assert noise_for(epsilon, DELTA, times) == pytest.approx(noise, abs=6e-5)


def test_golden_randomised_response():
    assert keep_probability(2.0, 10) == pytest.approx(0.450853, abs=5e-7)
    assert keep_probability(1e4, 10) == 1.0
    assert keep_probability(1e-9, 10) == pytest.approx(0.1)


def test_a_quantile_takes_its_share():
    noise = noise_beside_quantile(1.0, 5.0)
    assert noise == pytest.approx((1 - 0.01) ** -0.5)
    assert noise**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="cost more than"):
        noise_beside_quantile(1.0, 0.4)


@given(st.floats(1e-3, 100), st.floats(1e-10, 0.1))
def test_epsilon_and_delta_are_each_others_inverse(spent, delta):
    epsilon = gaussian_epsilon(spent, delta)
    assert gaussian_delta(spent, epsilon) <= delta
    if epsilon:
        assert gaussian_delta(spent, epsilon * (1 - 1e-6)) > delta * (1 - 1e-9)
    assert epsilon <= renyi_epsilon(spent, delta) + 1e-9


def test_the_curve_is_that_of_two_shifted_normals():
    """By numerical integration of max(0, p - e^epsilon q), which knows nothing of the formula."""
    import numpy as np

    for spent, epsilon in ((0.5, 0.7), (4.0, 1.5)):
        mu = math.sqrt(spent)
        x = np.linspace(-15, 15, 2_000_001)
        p, q = np.exp(-((x - mu) ** 2) / 2), np.exp(-(x**2) / 2)
        area = np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x) / math.sqrt(2 * math.pi)
        assert gaussian_delta(spent, epsilon) == pytest.approx(area, rel=1e-6)


@pytest.mark.parametrize("name", ["exact", "rdp", pytest.param("pld", marks=needs_library)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_calibrated_noise_keeps_the_budget_and_uses_it(name, epsilon):
    noise = noise_for(epsilon, DELTA, 7, name)
    spends = accountant.ACCOUNTANTS[name]
    assert spends(7 * release_cost(noise), DELTA) <= epsilon
    assert spends(7 * release_cost(noise * 0.99), DELTA) > epsilon
    assert 7 * release_cost(noise) <= spent_for(epsilon, DELTA, name)


@needs_library
@pytest.mark.parametrize(("noise", "times", "renyi", "exact"), GOLDEN)
def test_the_library_agrees(noise, times, renyi, exact):
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    library = RdpAccountant()
    library.compose(GaussianDpEvent(noise), times)
    assert library.get_epsilon(DELTA) == pytest.approx(renyi_epsilon(times / noise**2, DELTA))
    by_loss = accountant.loss_distribution_epsilon(times / noise**2, DELTA)
    assert by_loss == pytest.approx(exact, abs=5e-5)


@pytest.mark.skipif(LIBRARY, reason="dp-accounting is installed")
def test_the_library_is_named_where_it_is_missing():
    with pytest.raises(ConfigError, match=r"pipar-jax\[privacy\]"):
        accountant.check_accountant("pld")
