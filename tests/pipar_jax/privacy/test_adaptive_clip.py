"""A clip that follows a quantile of norms, as in arXiv 1905.03871."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pipar_jax.config import Config
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import gaussian_epsilon, noise_for, release_cost
from pipar_jax.privacy.adaptive_clip import CLIPPED, RANGE, WITHIN, AdaptiveClip, is_possible
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.privacy.policy import COUNTS, UPDATES, guarantee
from stages.release import bound_tree


def privacy(**values):
    config = Config(method="fl", epochs=20)
    config.aggregation.weighted, config.model.norm = False, "group"
    config.privacy.unit, config.privacy.update_clip, config.privacy.epsilon = "user", 1.0, 8.0
    for name, value in {"clip_quantile": 0.5, **values}.items():
        setattr(config.privacy, name, value)
    return resolve(config).privacy


@pytest.mark.parametrize(("first", "quantile", "noise_at"), [
    (0.01, 0.1, "server"), (0.01, 0.5, "device"), (0.01, 0.9, "server"),
    (100.0, 0.1, "device"), (100.0, 0.5, "server"), (100.0, 0.9, "device"),
])  # fmt: skip
def test_the_clip_comes_to_the_quantile_and_stays(first, quantile, noise_at):
    """From far below and far above, as in the paper's figure 1, with its noise of users / 20."""
    users, rounds = 400, 200
    draws = np.random.default_rng(0)
    norms = np.exp(draws.normal(0.5, 1.0, users))
    spread = users / 20 / (1 if noise_at == "server" else users**0.5)
    clip = AdaptiveClip(
        privacy(update_clip=first, clip_quantile=quantile, noise_at=noise_at, clip_rate=0.5),
        spread, users,
    )  # fmt: skip
    seen = []
    for _ in range(rounds):
        bits = np.where(norms <= clip.value, WITHIN, CLIPPED)
        if noise_at == "device":
            bits = bits + spread * draws.normal(size=users)
        clip.adapt(list(bits), draws.normal())
        seen.append(float(np.mean(norms <= clip.value)))
    assert np.mean(seen[rounds // 2 :]) == pytest.approx(quantile, abs=0.03)
    assert np.std(seen[rounds // 2 :]) < 0.1


def test_a_step_is_that_of_the_paper():
    clip = AdaptiveClip(privacy(noise_at="server", clip_rate=0.2), 3.0, 10)
    clip.adapt([WITHIN] * 6 + [CLIPPED] * 2, normal=0.5)  # two of ten are away
    assert clip.share == pytest.approx(0.5 + (6 * 0.5 - 2 * 0.5 + 1.5) / 10)
    assert clip.value == pytest.approx(math.exp(-0.2 * (clip.share - 0.5)))
    clip.adapt([], normal=1.0)  # nobody: nothing is known
    assert clip.value == pytest.approx(math.exp(-0.2 * (clip.share - 0.5)))


def test_a_liar_moves_the_clip_no_more_than_others_and_not_out_of_its_range():
    honest = [CLIPPED] * 9
    for noise_at in ("device", "server"):
        clip = AdaptiveClip(privacy(noise_at=noise_at, clip_rate=10.0), 0.01, 10)
        for lie in (1e9, -1e9):
            clip.adapt([*honest, lie], normal=0.0)
            assert abs(clip.share - 0.05) <= 0.1
    for lie, end in ((1.0, 1 / RANGE), (-1.0, RANGE)):
        for _ in range(20):
            clip.adapt([lie] * 10, normal=0.0)
        assert clip.value == pytest.approx(end)
        assert is_possible(privacy(), clip.value)
    assert not is_possible(privacy(), 2 * RANGE) and not is_possible(privacy(), 0.0)


@pytest.mark.parametrize("count_noise", [None, 20.0])
def test_an_adaptive_clip_costs_what_a_fixed_one_does(count_noise):
    """Golden: z = (z_update**-2 + (2 count_noise)**-2)**-1/2, theorem 1."""
    fixed = guarantee(privacy(clip_quantile=None), (), 20)
    adaptive = guarantee(privacy(count_noise=count_noise), (), 20)
    assert fixed.releases == (UPDATES,) and adaptive.releases == (UPDATES, COUNTS)
    assert fixed.releases_planned == adaptive.releases_planned == 20
    assert fixed.noise == noise_for(8.0, 1e-5, 20)
    assert adaptive.noise > fixed.noise
    assert adaptive.cost == pytest.approx(fixed.cost, rel=1e-12)
    assert 20 * adaptive.cost <= adaptive.limit
    assert gaussian_epsilon(20 * adaptive.cost, 1e-5) == pytest.approx(8.0, abs=1e-6)
    if count_noise is None:
        assert adaptive.noise == pytest.approx(fixed.noise * 0.99**-0.5, rel=1e-9)
    assert adaptive.cost == release_cost(adaptive.noise) + release_cost(2 * adaptive.count_noise)


def test_what_is_within_is_not_scaled_and_what_is_not_finite_is_not_within():
    for value, within in ((0.5, True), (3.0, False), (math.nan, False), (math.inf, False)):
        tree = {"a": jnp.array([value, 0.0])}
        clipped, told = bound_tree(tree, 1.0)
        assert bool(told) == within
        assert (float(clipped["a"][0]) == value) == within


def test_a_single_number_is_normal():
    source = NoiseSource(reproducible_key("single"))
    drawn = [source.normal() for _ in range(5000)]
    assert np.std(drawn) == pytest.approx(1, abs=0.05)
    assert np.mean(drawn) == pytest.approx(0, abs=0.06)
