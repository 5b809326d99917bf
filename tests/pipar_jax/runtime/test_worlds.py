"""Links and devices that change during a run, as files say."""

from __future__ import annotations

import statistics

from pipar_jax.schedule.actions import FORWARD, SEND_BACKWARD, SEND_FORWARD
from tests.pipar_jax.runtime import support

SAMPLES = (35, 35)


def test_rates_and_slowness_change_from_the_first_release_on(tmp_path):
    link, slow = tmp_path / "link.csv", tmp_path / "slow.csv"
    link.write_text("time_s,up_mbps,down_mbps\n0,1000,1000\n0.001,1,2\n")
    slow.write_text("time_s,slowdown\n0,1\n0.001,1000\n")
    made = support.config(tmp_path, SAMPLES, dtype="float32")
    made.pipeline.cut, made.pipeline.micro_batches = 1, 2
    made.aggregation.every = "epoch"
    made.devices.overrides = {0: {"link": f"trace:{link}"}, 1: {"slowdown_trace": str(slow)}}
    trace = support.trained(made, SAMPLES, support.model(dtype="float32")).trace()
    rows = sorted(trace.rows(), key=lambda pair: pair[1].start_s)

    def of(kind: str, device: int):
        return [row for _, row in rows if row.action.kind == kind and row.action.device == device]

    # The emulated link's own clock: to the byte, however busy this machine is.
    for kind, mbps in ((SEND_FORWARD, 1.0), (SEND_BACKWARD, 2.0)):
        for row in of(kind, 0)[-4:]:
            assert row.end_s - row.start_s >= 0.999 * row.nbytes * 8 / (mbps * 1e6)
    quick, slowed = (
        statistics.median(row.end_s - row.start_s for row in of(FORWARD, device)[-6:])
        for device in (0, 1)
    )
    assert slowed > 5 * quick
