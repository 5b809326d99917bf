"""Emulated links: parsing, the virtual clock, goodput and what overtakes what."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest

from comms import ChannelError, LinkShape, Role, Tag, parse_link
from comms.emulation.shaping import MAX_CHUNK_BYTES, Shaper, chunk_bytes
from tests.patience import PATIENCE_S

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "up", "down", "delay_s"),
    [
        ("4g", 10, 25, 0),
        ("4g+", 20, 40, 0),
        ("wifi", 50, 50, 0),
        ("LAN", 1000, 1000, 0),
        ("none", None, None, 0),
        ("20/40", 20, 40, 0),
        (" 0.5/2.25 ", 0.5, 2.25, 0),
        ("20/40/30ms", 20, 40, 0.015),
        ("20/40/1.5s", 20, 40, 0.75),
        ("4g+/20ms", 20, 40, 0.01),
        ("none/20ms", None, None, 0.01),
    ],
)
def test_links_are_parsed(text, up, down, delay_s):
    assert parse_link(text) == (LinkShape(up, delay_s), LinkShape(down, delay_s))


@pytest.mark.parametrize("text", ["", "5g", "20", "20/40/30", "20/x", "-1/2", "0/5", "1/2/3/4"])
def test_what_is_no_link_is_refused(text):
    with pytest.raises(ChannelError):
        parse_link(text)


@pytest.mark.parametrize(
    "values",
    [
        {"rate_mbps": 0.0},
        {"rate_mbps": float("nan")},
        {"delay_s": -1.0},
        {"schedule": ((2.0, 1.0), (1.0, 1.0))},
        {"schedule": ((0.0, -1.0),)},
    ],
)
def test_impossible_shapes_are_refused(values):
    with pytest.raises(ChannelError):
        LinkShape(**values)


def test_the_virtual_clock_makes_up_for_late_wake_ups():
    shaper = Shaper(LinkShape(8.0), 100.0)  # a megabyte per second
    assert shaper.admit(100.0, 500_000, waiting=False) == (100.0, 100.5)
    # Woken 20 ms late with the next frame waiting: it began when the first ended.
    assert shaper.admit(100.52, 500_000, waiting=True) == (100.5, 101.0)
    # But not before the frame was there, whatever waited before it.
    later = Shaper(LinkShape(8.0), 100.0)
    assert later.admit(100.02, 500_000, waiting=True, queued_s=100.01)[0] == 100.01
    # Not waiting: the link was idle until now.
    assert shaper.admit(103.0, 100_000, waiting=False) == (103.0, pytest.approx(103.1))


def test_a_schedule_changes_the_rate_within_a_frame():
    shaper = Shaper(LinkShape(8.0, schedule=((1.0, 80.0), (2.0, 0.8))), 0.0)
    # 1 MB in the first second, 10 MB in the second, then 0.1 MB/s.
    assert shaper.admit(0.0, 6_000_000, waiting=False)[1] == pytest.approx(1.5)
    assert shaper.admit(1.5, 5_100_000, waiting=True)[1] == pytest.approx(3.0)
    assert shaper.rate_bytes(0.5) == 1e6 and shaper.rate_bytes(1.5) == 1e7


@pytest.mark.parametrize("rate", [1e5, 1.25e6, 6.25e6, 1e9, None])
def test_a_chunk_never_holds_the_link_for_long(rate):
    size = chunk_bytes(rate)
    assert size <= MAX_CHUNK_BYTES
    assert rate is None or size / rate <= 0.05


@pytest.mark.parametrize("rate_mbps", [10.0, 50.0])
def test_goodput_comes_close_to_the_rate_and_control_overtakes(workshop, rate_mbps, quiet):
    pair = workshop.pair(shape=LinkShape(rate_mbps))
    nbytes = int(rate_mbps * 1e6 / 8)
    left: queue.Queue = queue.Queue()
    began = time.monotonic()
    pair.up.send(
        Tag(role=Role.ACTIVATION), np.zeros(nbytes, np.uint8), on_sent=lambda *at: left.put(at)
    )
    time.sleep(0.2)
    pair.up.send_control({"urgent": True})
    first, message = pair.at_server.take(), pair.at_server.take()
    assert first.kind == "control" or not quiet  # this thread may have come late
    if first.kind != "control":
        first, message = message, first
    # Never faster than the link. How much slower is the benchmark's to say, since the machine that
    # runs the tests may be busy.
    assert nbytes * 8 / 1e6 / (message.received_s - began) <= rate_mbps
    start_s, end_s, wire_bytes = left.get(timeout=PATIENCE_S)
    paced_mbps = wire_bytes * 8 / 1e6 / (end_s - start_s)
    assert paced_mbps < 1.001 * rate_mbps
    assert not quiet or paced_mbps > 0.4 * rate_mbps


def test_round_trip_and_bandwidth_are_estimated(workshop, quiet):
    pair = workshop.pair(shape=LinkShape(30.0, 0.03))
    pair.down.set_shape(LinkShape(60.0))  # no delay: the first heartbeats may be back already
    for _ in range(40):
        pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(MIB // 8, np.uint8))
        pair.down.send(Tag(role=Role.COTANGENT), np.zeros(MIB // 8, np.uint8))
    for _ in range(40):
        pair.at_server.take_array()
        pair.at_client.take_array()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (
        pair.up.stats().rate_out_mbps is None or pair.down.stats().rate_out_mbps is None
    ):
        time.sleep(0.05)
    time.sleep(0.3)
    rates = pair.up.stats().rate_out_mbps, pair.up.stats().rate_in_mbps
    assert min(rates) > 0
    assert not quiet or rates == pytest.approx((30, 60), rel=0.3)
    # Both ends read one clock here; unequal delays shift the estimate by half their difference,
    # and what a busy machine adds to a round trip by half of that at most.
    for link, offset_s in ((pair.up, 0.015), (pair.down, -0.015)):
        assert link.rtt_s >= 0.03 and (not quiet or link.rtt_s < 0.5)
        assert abs(link.offset_s - offset_s) <= (link.rtt_s - 0.03) / 2 + 1e-3


@pytest.mark.parametrize("rate_mbps", [10.0, 50.0])
def test_a_thread_that_comes_late_does_not_stop_an_emulated_link(workshop, rate_mbps, quiet):
    pair = workshop.pair(shape=LinkShape(rate_mbps))
    time.sleep(0.3)  # past the first, frequent heartbeats, which would start it again
    nbytes = int(rate_mbps * 1e6 / 8 * 0.4)
    began = time.monotonic()
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(nbytes, np.uint8))
    for _ in range(3):
        time.sleep(0.05)
        pair.client.loop.post(lambda: time.sleep(0.08))
    message = pair.at_server.take()
    took_s = message.received_s - began
    assert took_s >= 0.4 * 0.98 and (not quiet or took_s < 0.9)


def test_lifting_a_shape_keeps_the_order_of_what_was_on_its_way(workshop):
    pair = workshop.pair(shape=LinkShape(50.0, 0.2))
    for step in range(10):
        pair.up.send(Tag(role=Role.ACTIVATION, step=step), np.full(20_000, step, np.int32))
    time.sleep(0.1)
    pair.up.set_shape(LinkShape())
    for step in range(10, 20):
        pair.up.send(Tag(role=Role.ACTIVATION, step=step), np.full(20_000, step, np.int32))
    for step in range(20):
        message = pair.at_server.take()
        assert message.tag.step == step and (message.array == step).all()
        message.release()


def test_what_is_sent_after_a_change_of_shape_never_leaves_before_it(workshop):
    pair = workshop.pair()
    entered, shaped = threading.Event(), threading.Event()

    def hold(*_) -> None:
        """Keeps the I/O thread between two messages while the shape is set."""
        entered.set()
        shaped.wait(PATIENCE_S)

    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(64, np.uint8), on_sent=hold)
    assert entered.wait(PATIENCE_S)
    began = time.monotonic()
    pair.up.set_shape(LinkShape(8.0))
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(300_000, np.uint8))
    shaped.set()
    pair.at_server.take().release()
    assert pair.at_server.take().received_s - began >= 0.29


def test_a_shape_can_be_changed_and_lifted(workshop):
    pair = workshop.pair(shape=LinkShape(0.1))
    pair.up.set_shape(LinkShape())
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(MIB, np.uint8))
    pair.at_server.take_array()  # shaped it would take more than a minute, here it waits for 20 s


def test_a_shape_set_late_goes_on_where_its_schedule_is():
    shape = LinkShape(8.0, 0.01, ((1.0, 80.0), (2.0, 0.8)))
    for elapsed_s in (0.0, 0.5, 1.0, 1.7, 3.0):
        later = shape.after(elapsed_s)
        for at_s in (0.0, 0.4, 2.5):
            assert later.rate_at(at_s) == shape.rate_at(elapsed_s + at_s)
        assert later.delay_s == shape.delay_s
    assert LinkShape().after(3.0).unlimited
