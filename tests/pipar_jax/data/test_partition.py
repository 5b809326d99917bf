"""Partitions: every sample once, nobody without, seeded, and as skewed as their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipar_jax.config import DataConfig
from pipar_jax.data import partition, partition_table
from pipar_jax.data.partition import PARTITIONS, spread
from pipar_jax.errors import DataError

LABELS = np.random.default_rng(5).integers(0, 10, 5000)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(tuple(PARTITIONS)),
    samples=st.integers(12, 400),
    count=st.integers(1, 6),
    alpha=st.sampled_from([0.01, 0.5, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_sample_goes_to_one_device_and_no_device_is_empty(
    kind: str, samples: int, count: int, alpha: float, seed: int
) -> None:
    config = DataConfig(partition=kind, alpha=alpha)
    labels = LABELS[:samples]
    parts = partition(labels, count, config, seed)
    assert len(parts) == count
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(samples))
    again = partition(labels, count, config, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", PARTITIONS)
def test_another_seed_deals_otherwise(kind: str) -> None:
    config = DataConfig(partition=kind)
    one, other = (partition(LABELS, 4, config, seed)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_iid_parts_differ_by_at_most_one_sample() -> None:
    sizes = [len(part) for part in partition(LABELS[:4999], 3, DataConfig(), 0)]
    assert max(sizes) - min(sizes) == 1


def test_a_small_alpha_skews_classes_and_a_large_one_does_not() -> None:
    def worst(alpha: float) -> float:
        parts = partition(LABELS, 5, DataConfig(partition="dirichlet", alpha=alpha), 0)
        shares = np.stack([np.bincount(LABELS[part], minlength=10) / len(part) for part in parts])
        return float(np.abs(shares - 0.1).max())

    assert worst(0.1) > 0.2 > 0.06 > worst(1000.0)


def test_label_shards_give_a_device_few_classes() -> None:
    parts = partition(LABELS, 10, DataConfig(partition="labels", shards_per_device=2), 0)
    assert max(len(np.unique(LABELS[part])) for part in parts) <= 4


def test_quantity_skews_sizes_and_leaves_classes_alone() -> None:
    parts = partition(LABELS, 5, DataConfig(partition="quantity", alpha=0.5), 1)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    largest = LABELS[max(parts, key=len)]
    assert np.abs(np.bincount(largest, minlength=10) / len(largest) - 0.1).max() < 0.03


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="3 samples cannot be divided among 4 devices"):
        partition(LABELS[:3], 4, DataConfig(), 0)
    with pytest.raises(DataError, match=r"shards_per_device"):
        partition(LABELS[:7], 4, DataConfig(partition="labels", shards_per_device=2), 0)


def test_the_table_counts_what_was_dealt() -> None:
    parts = [np.array([0, 1, 2]), np.array([3, 4])]
    lines = partition_table(np.array([0, 0, 1, 1, 2]), parts, 3).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["d0", "3", "2", "1", "0"],
        ["d1", "2", "0", "1", "1"],
    ]
    assert len({len(line) for line in lines}) == 1  # columns stand below one another


def test_the_table_of_many_classes_stays_narrow() -> None:
    labels = np.arange(1000) % 100
    text = partition_table(labels, partition(labels, 2, DataConfig(), 0), 100)
    assert max(map(len, text.splitlines())) < 60
    assert "100" in text


def test_spread_takes_evenly_and_without_repetition() -> None:
    assert spread(10, 0).tolist() == list(range(10))
    assert spread(10, 10).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert len(set(spread(50_000, 2_000).tolist())) == 2_000
