"""What the peer is told: one wake-up for many releases, and no release forgotten."""

from __future__ import annotations

import pytest

from comms.link.status_reports import StatusReports
from comms.options import ChannelOptions
from comms.wire.frame import STATUS


class Loop:
    """Keeps posted calls and timers until the test runs them."""

    def __init__(self):
        self.posted, self.timers = [], []

    def post(self, call):
        self.posted.append(call)

    def at(self, when_s, call):
        timer = Timer(call)
        self.timers.append(timer)
        return timer

    def run(self):
        for queue in (self.posted, self.timers):
            calls, queue[:] = list(queue), []
            for call in calls:
                call()


class Timer:
    def __init__(self, call):
        self.call = call

    def __call__(self):
        if self.call is not None:
            self.call()

    def cancel(self):
        self.call = None


class Rate:
    bytes_per_s = None


class Inbox:
    received = released_bytes = bytes_in = 0
    rate = Rate()


class Outbox:
    status_due = keep = False


class Desk:
    """Reports about a made-up inbox; `told` are the STATUS payloads that a flush would send."""

    def __init__(self, **options):
        self.loop, self.inbox, self.outbox, self.told = Loop(), Inbox(), Outbox(), []
        self.inbox.rate = Rate()
        self.reports = StatusReports(
            self.inbox, self.outbox, self.loop, ChannelOptions(**options),
            self.flush, lambda: self.loop.post(self.flush),
        )  # fmt: skip
        self.reports.connect()

    def flush(self):
        if self.outbox.status_due:
            self.outbox.status_due = False
            self.told.append(STATUS.unpack(self.reports.pack()))


def test_many_releases_wake_the_thread_once_and_all_are_told():
    desk = Desk(window_bytes=1 << 20)
    for _ in range(5):
        for _ in range(100):
            desk.reports.release(64)
        desk.loop.run()
        desk.reports.release(64)
        assert not desk.loop.posted or not desk.loop.timers
    desk.loop.run()
    assert desk.told[-1][1] == desk.inbox.released_bytes == 5 * 101 * 64
    assert len(desk.told) <= 6


def test_between_two_reports_only_the_first_release_posts():
    desk = Desk(window_bytes=1 << 20)
    desk.reports.release(64)
    desk.loop.posted.pop()()
    for _ in range(50):
        desk.reports.release(64)
    assert not desk.loop.posted and len(desk.loop.timers) == 1
    desk.loop.run()
    assert desk.told == [(0, 51 * 64, 0.0)]
    desk.reports.release(64)
    assert len(desk.loop.posted) == 1


def test_a_quarter_of_the_window_is_told_at_once():
    desk = Desk(window_bytes=1000)
    desk.reports.release(250)
    desk.loop.posted.pop()()
    assert desk.told == [(0, 250, 0.0)]


def test_releases_around_a_cut_are_told_on_the_next_connection():
    desk = Desk(window_bytes=1 << 20)
    desk.reports.release(64)
    desk.loop.posted.pop()()
    desk.reports.disconnect()
    desk.reports.release(64)
    desk.loop.run()
    assert desk.told == [], "there is nowhere to send it"
    desk.reports.connect()
    desk.outbox.status_due = True
    desk.flush()
    desk.reports.release(64)
    desk.loop.run()
    assert [told[1] for told in desk.told] == [128, 192]


@pytest.mark.parametrize(
    ("rate", "keep", "arrived", "at_once"),
    [
        (None, False, 1 << 15, True),
        (None, False, 1 << 14, False),
        (1e6, True, 1 << 15, True),
        (1e9, True, 1 << 15, False),
        (1e9, True, 2_000_000, True),
        (4e9, True, 2_500_000, True),
    ],
)
def test_arrivals_are_told_in_portions_that_grow_with_the_rate(rate, keep, arrived, at_once):
    desk = Desk(replay_bytes=10_000_000)
    desk.outbox.keep, desk.inbox.rate.bytes_per_s = keep, rate
    desk.reports.pack()
    desk.inbox.received, desk.inbox.bytes_in = 1, arrived
    desk.reports.note_arrivals()
    assert desk.outbox.status_due == at_once
    assert len(desk.loop.timers) == (not at_once)
