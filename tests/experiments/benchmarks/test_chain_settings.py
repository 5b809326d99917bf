"""Chains held against predictions: the cuts with the least largest node."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from experiments.benchmarks import chain_settings


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_cuts_are_the_best_of_all(nodes: int) -> None:
    rng = random.Random(nodes)
    facts = [
        SimpleNamespace(parameter_bytes=rng.randrange(100), residual_bytes=rng.randrange(300))
        for _ in range(10)
    ]
    cuts = chain_settings.best_cuts(facts, 1, 9, nodes)  # type: ignore[arg-type]
    assert (cuts[0], cuts[-1], len(cuts)) == (1, 9, nodes + 1)
    every = [(1, *middle, 9) for middle in itertools.combinations(range(2, 9), nodes - 1)]
    most = [max(chain_settings.model_bytes(facts, one)) for one in every]  # type: ignore[arg-type]
    assert max(chain_settings.model_bytes(facts, cuts)) == min(most)  # type: ignore[arg-type]
