"""The table of fine-tuning GPT-2 small follows from its shapes."""

from __future__ import annotations

import pytest

from experiments.benchmarks import fine_tuning
from experiments.benchmarks.fine_tuning import BATCH, CUT, LENGTH, STEPS, WAYS, cost


@pytest.mark.soak
def test_the_figures_follow_from_the_shapes() -> None:
    found = {way.name: cost(way) for way in WAYS if way.method == "pipar"}
    adapters = 4 * 8 * (768 + 3 * 768) * (CUT - 1)
    whole, some, half = found.values()
    assert some.averaged == half.averaged == 2 * adapters
    block = 12 * 768**2 + 13 * 768
    part = 768 * (50257 + 1024) + (CUT - 1) * block
    assert whole.averaged == 2 * 4 * part
    targets = STEPS * BATCH * LENGTH * 4
    assert whole.activations == some.activations == STEPS * 2 * BATCH * LENGTH * 768 * 4 + targets
    assert half.activations - targets == (some.activations - targets) / 2
    assert some.device < whole.device and some.server < whole.server and half.device < some.device
    ranks = list(fine_tuning.ratios())
    assert [rank for rank, _, _ in ranks] == [1, 2, 4, 8]
    assert ranks[-1][1] == pytest.approx(adapters / (4 * part))
    assert ranks[-1][2] == pytest.approx(adapters / (4 * 124_439_808))
