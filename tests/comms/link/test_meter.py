"""What a link's rate is told by."""

from __future__ import annotations

import pytest

from comms.link.meter import RateMeter

RATE = 1.25e6


def frames(meter: RateMeter, sizes: list[int], start_s: float, rate: float = RATE) -> float:
    """Lets frames arrive without a gap, the first after one; returns when the last has ended."""
    for index, size in enumerate(sizes):
        start_s += size / rate
        meter.add(size, index > 0, start_s)
    return start_s


def test_the_rate_is_that_of_frames_without_a_gap():
    meter = RateMeter()
    assert meter.bytes_per_s is None
    end_s = frames(meter, [8192] * 10, 5.0)
    frames(meter, [8192] * 10, end_s + 3.0)
    assert meter.bytes_per_s == pytest.approx(RATE)


def test_only_long_runs_are_timed():
    meter, now_s = RateMeter(), 0.0
    for _ in range(20):  # 13 ms each, and as much of threads that woke up late
        now_s = frames(meter, [4096] * 4, now_s + 0.1, RATE / 2)
    assert (meter.timed_bytes, meter.timed_s) == (0, 0.0)
    frames(meter, [4096] * 40, now_s + 0.1)
    assert meter.timed_bytes == 39 * 4096
    assert meter.timed_bytes / meter.timed_s == pytest.approx(RATE)


def test_on_a_fast_link_a_run_is_long_by_its_bytes():
    meter = RateMeter()
    frames(meter, [1 << 18] * 4, 0.0, 1e9)
    assert meter.timed_bytes == 0
    frames(meter, [1 << 18] * 6, 1.0, 1e9)
    assert meter.timed_bytes == 5 << 18
    assert meter.timed_bytes / meter.timed_s == pytest.approx(1e9)


def test_small_frames_belong_to_the_run_that_they_are_in():
    meter = RateMeter()
    frames(meter, [65536, 200, 65536, 200], 0.0)
    assert meter.timed_bytes == 65536 + 400
    assert meter.timed_bytes / meter.timed_s == pytest.approx(RATE)


def test_a_new_connection_begins_a_new_run():
    meter = RateMeter()
    end_s = frames(meter, [30000, 30000], 0.0)
    meter.restart()
    meter.add(30000, True, end_s + 0.024)
    meter.add(30000, True, end_s + 0.048)
    assert meter.timed_bytes == 0
