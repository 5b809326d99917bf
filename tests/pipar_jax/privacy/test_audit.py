"""An audit with canaries in one run (Steinke, Nasr and Jagielski, arXiv 2305.08846), fixed seed.

Each canary is one of two records (or users) that are as far apart as clipping allows, by a coin.
The auditor sees what is released, guesses the coins of those it is surest of, and so bounds epsilon
from below. The canaries are independent, so this is close to the best that any attack can do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import stages
from pipar_jax.config import Config
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import gaussian_epsilon, release_cost
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.update_transforms import leave, update_transforms
from pipar_jax.schedule.plan import DevicePlan
from pipar_jax.training.replica import Noise
from stages.release import PrivateRelease, bits_shape

pytestmark = pytest.mark.soak

NOISE, CLIP, DELTA, COUNT = 4.0, 0.5, 1e-6, 60_000
COUNT_NOISE = 2.5
CLAIMED = gaussian_epsilon(release_cost(NOISE), DELTA)


def source(what):
    return NoiseSource(reproducible_key("audit", what))


def is_refuted(epsilon, correct, guesses, canaries):
    """Whether so many correct guesses have a probability below 1 % under (epsilon, delta)-DP.

    Theorem 5.2 of the paper: the tail of a binomial distribution, and a term for delta.
    """
    share = 1 / (1 + np.exp(-epsilon))
    tail = binom.sf(correct - 1, guesses, share)
    steps = np.arange(1, correct + 1)
    slope = np.max((binom.sf(correct - steps - 1, guesses, share) - tail) / steps)
    return tail + 2 * canaries * DELTA * slope < 0.01


def audited(scores, coins):
    """The least epsilon that is not refuted by guessing the hundredth that is surest."""
    guesses = len(scores) // 100
    surest = np.argsort(-np.abs(scores))[:guesses]
    correct = int(np.sum((scores[surest] > 0) == coins[surest]))
    grid = np.arange(0.0, 12.0, 0.05)
    return next((e for e in grid if not is_refuted(e, correct, guesses, len(scores))), 12.0)


def coins_of(count):
    return (source("coins").bits(count) & 1).astype(bool)


def of_activations(count=COUNT):
    release = PrivateRelease(NOISE, activation_clip=CLIP, shape=(4,))
    coins = coins_of(count)
    direction = np.array([0.6, 0.0, -0.8, 0.0], np.float32)
    records = jnp.asarray(np.where(coins[:, None], 100.0, -100.0) * direction, jnp.float32)
    draw = stages.make_draw(count)._replace(noise=source("a").bits(*release.bits_shape(count)))
    return audited(np.asarray(release.release_activation(records, draw)) @ direction, coins)


class Adding:
    """A device's noise, without its ledger; ``bits`` are those of the next update."""

    clip = CLIP

    def observe(self, within, round_):
        pass

    def enter_update(self):
        pass

    def update_noise(self, round_, numbers):
        assert self.bits.shape == bits_shape(numbers)
        return Noise(self.bits, np.float32(NOISE * CLIP))


def of_users(count=COUNT):
    config = Config(method="fl")
    config.privacy.noise, config.privacy.update_clip, config.privacy.unit = NOISE, CLIP, "user"
    config.aggregation.weighted, config.model.norm = False, "group"
    noise = Adding()
    transforms = update_transforms(resolve(config), noise)

    def left(trained, bits):
        noise.bits = bits
        return leave(transforms, {"u": {"w": jnp.zeros(2)}}, {"u": {"w": trained}}, 0)["u"]["w"]

    coins = coins_of(count)
    trained = np.where(coins[:, None], 1.0, -1.0) * np.array([30.0, 40.0])
    bits = source("u").bits(count, *bits_shape(2))
    sent = jax.vmap(left)(jnp.asarray(trained, jnp.float32), bits)
    return audited(np.asarray(sent) @ [0.6, 0.8], coins)


def of_counts(count=COUNT):
    """Whether an update was within a clip that adapts, as devices say it."""
    config = Config(method="fl", seed=1)
    config.privacy.noise, config.privacy.update_clip, config.privacy.unit = NOISE, CLIP, "user"
    config.privacy.clip_quantile, config.privacy.count_noise = 0.5, COUNT_NOISE
    config.privacy.reproducible = True  # a fixed seed
    config.aggregation.weighted, config.model.norm = False, "group"
    releases = Releases(resolve(config), "d0")
    releases.calibrate(DevicePlan((), ("device",)), 1)
    coins, bits = coins_of(count), []
    for user, coin in enumerate(coins):
        releases.observe(coin, user)
        bits.append(releases.within)
    return audited(np.asarray(bits), coins)


AUDITS = [
    (of_activations, CLAIMED),
    (of_users, CLAIMED),
    (of_counts, gaussian_epsilon(release_cost(2 * COUNT_NOISE), DELTA)),
]


@pytest.mark.parametrize(("audit", "claimed"), AUDITS)
def test_an_audit_stays_below_the_claim_and_means_something(audit, claimed):
    assert 0.3 * claimed < audit() <= claimed


@pytest.mark.parametrize(("audit", "claimed"), AUDITS)
def test_an_audit_finds_noise_that_is_halved_in_the_code(audit, claimed, monkeypatch):
    from stages import release

    normal, single = release.normal, NoiseSource.normal
    monkeypatch.setattr(release, "normal", lambda *of: normal(*of) / 2)
    monkeypatch.setattr(NoiseSource, "normal", lambda source: single(source) / 2)
    release.add_noise.clear_cache()
    try:
        assert audit() > claimed
    finally:
        release.add_noise.clear_cache()
