"""The settings of `experiments.bench_privacy` are valid, and its mechanisms do what they time."""

from __future__ import annotations

import contextlib
import itertools

import jax
import numpy as np

from experiments import bench_privacy
from experiments.benchmarks import harness
from experiments.benchmarks.privacy_trials import (
    DATA,
    EPSILONS,
    VARIANTS,
    Setting,
    mean_and_error,
    mechanisms,
)
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import release_cost
from pipar_jax.privacy.ledger import PrivacyLedger
from pipar_jax.privacy.policy import guarantee

MECHANISMS = (
    "forward", "forward, clipped and noised", "backward", "backward, each example clipped",
    "noise on the gradient", "bits for an activation", "bits for the gradient",
    "ledger entry on disk",
)  # fmt: skip


def test_all_settings_are_valid_and_have_names_of_their_own(tmp_path):
    names = set()
    for data, variant, epsilon in itertools.product(DATA, VARIANTS, EPSILONS):
        setting = Setting(data, variant, epsilon, 0, 1000, 2, str(tmp_path))
        config = resolve(setting.config(tmp_path))
        names.add(setting.name)
        assert config.privacy.on == (epsilon is not None)
        if config.privacy.on:
            hosts = ("device",) if variant.method == "fl" else ("device", "server")
            promised = guarantee(config.privacy, hosts, 2)
            assert promised.releases_planned == 2 * len(hosts)
            assert promised.cost == len(hosts) * release_cost(promised.noise)
    assert len(names) == len(DATA) * len(VARIANTS) * len(EPSILONS)


def test_every_mechanism_runs(tmp_path):
    with contextlib.closing(PrivacyLedger(tmp_path)) as ledger:
        cases = mechanisms(2, 1, ledger)
        made = {name: case() for name, case in cases.items()}
    assert tuple(made) == MECHANISMS
    plain, private = made["forward"], made["forward, clipped and noised"]
    assert plain.shape == private.shape and np.std(private) > 1  # the noise is 4
    plain, private = made["backward"], made["backward, each example clipped"]
    assert jax.tree.structure(plain) == jax.tree.structure(private)
    assert PrivacyLedger(tmp_path).spending.spent == 1.0


def test_a_mean_has_an_error_where_there_are_several_values():
    assert mean_and_error([3.0])[0] == 3.0 and np.isnan(mean_and_error([3.0])[1])
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_quick_mechanisms_are_a_row_each(tmp_path):
    run = harness.Bench("privacy", quick=True)
    bench_privacy.mechanisms(run, tmp_path, tmp_path)
    assert [row.name for row in run.rows] == [f"cut 1: {name}" for name in MECHANISMS]
    assert all(row.unit == "ms" and row.value > 0 for row in run.rows)
