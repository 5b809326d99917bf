"""The two ways whose seconds `experiments.bench_tasks` compares train the same network."""

from __future__ import annotations

import jax
import numpy as np

from experiments.benchmarks.task_overhead import Training


def test_both_ways_train_the_same():
    ways = [Training(name, batch=4, steps=2) for name in ("task", "direct")]
    started = jax.tree.map(np.array, ways[0].params)
    mine, theirs = (jax.tree.leaves(way.epoch()) for way in ways)
    for here, there in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-7)
    for stage, before in zip(ways[0].params, started, strict=True):  # both stages have learnt
        assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, stage, before))))
    assert ways[0].right == ways[1].right
    np.testing.assert_allclose(ways[0].loss, ways[1].loss, rtol=1e-6)
