"""Memory that an average takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.patience import PROCESS_S

# Averages two replicas of eight arrays of 8 MB, and prints the megabytes by which the process's
# peak has grown. Replicas are aligned, as the channel's buffers are, so that nothing copies them.
PEAK = """
import jax
import jax.numpy as jnp
from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import AggregationConfig
from stages.allocator import peak_bytes

def weights(value):
    return {"unit": {str(i): jnp.full(2_000_000, value, jnp.float32) for i in range(8)}}

aggregator = Aggregator(AggregationConfig(), weights(0.0), {"unit": {}})
aggregator.compile()
replicas = [Contribution(weights(value), {"unit": {}}, 1.0) for value in (1.0, 3.0)]
jax.block_until_ready(replicas)
before = peak_bytes()
aggregator.aggregate(replicas)
assert all(float(one[7]) == 2.0 for one in aggregator.params["unit"].values())
print((peak_bytes() - before) / 1e6)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere a child begins at its parent's"
)
def test_an_average_holds_no_intermediate_result_of_more_than_one_array():
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROCESS_S)
    assert float(done.stdout) < 64 + 3 * 8  # the new weights, and less than another set of them
