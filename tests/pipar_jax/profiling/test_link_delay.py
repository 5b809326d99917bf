"""The probe finds a link's delay, and little else."""

from __future__ import annotations

import pytest

from comms import LinkShape
from pipar_jax.profiling.link_delay import measure_delay_s


@pytest.mark.parametrize("rate_mbps", [None, 400.0])
def test_the_delay_of_the_shape_is_found(rate_mbps: float | None, quiet: bool) -> None:
    found = measure_delay_s(LinkShape(rate_mbps, 0.05), 100_000, repeats=3)
    assert found >= 0.049
    assert not quiet or found < 0.1  # loopback and wake-ups add a little, a busy machine more


def test_without_a_delay_the_overhead_is_small(quiet: bool) -> None:
    found = measure_delay_s(LinkShape(), 1000, repeats=5)
    assert found >= 0.0
    assert not quiet or found < 0.05
