"""A device that lost the coordinator tries again for as long as it may, and not without reason."""

from __future__ import annotations

import threading

import pytest

from pipar_jax.errors import DataError, JoinError, PeerError, PiparError
from pipar_jax.roles import rejoin


class Run:
    """Tries to take part that end as they are told, on a clock that pauses move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: PiparError | None) -> None:
        self.ends, self.timeouts, self.now_s = list(ends), [], 0.0
        self.stop = threading.Event()
        monkeypatch.setattr(self.stop, "wait", self._wait)

    def _wait(self, seconds: float) -> None:
        self.now_s += seconds

    def take_part(self, timeout_s: float) -> None:
        self.timeouts.append(timeout_s)
        if (error := self.ends.pop(0)) is not None:
            raise error

    def persist(self, rejoin_s: float) -> None:
        rejoin.persist(
            self.take_part, join_timeout_s=60.0, rejoin_s=rejoin_s, stop=self.stop,
            clock=lambda: self.now_s,
        )  # fmt: skip


def error(kind: type[PiparError], *, again: bool, taken: bool) -> PiparError:
    made = kind("gone")
    made.again, made.taken = again, taken
    return made


LOST = {"again": True, "taken": True}


def test_who_loses_the_coordinator_comes_back_and_the_time_begins_anew(monkeypatch):
    ends = [error(PeerError, **LOST), error(JoinError, again=True, taken=False)] * 3
    run = Run(monkeypatch, *ends, None)
    run.persist(10.0)
    assert not run.ends and run.timeouts[0] == 60.0
    assert all(9 <= left <= 10.0 for left in run.timeouts[1::2])
    assert 0 < run.now_s < 6


@pytest.mark.parametrize(
    ("kind", "again", "taken", "rejoin_s"),
    [
        (PeerError, True, True, 0.0),
        (PeerError, False, True, 100.0),
        (DataError, False, False, 100.0),
    ],
)
def test_what_cannot_be_mended_by_coming_back_ends_at_once(
    monkeypatch, kind, again, taken, rejoin_s
):
    run = Run(monkeypatch, error(kind, again=again, taken=taken))
    with pytest.raises(kind):
        run.persist(rejoin_s)
    assert run.now_s == 0


def test_it_gives_up_when_its_time_is_over_and_pauses_grow(monkeypatch):
    run = Run(monkeypatch, *[error(JoinError, again=True, taken=False)] * 100)
    with pytest.raises(JoinError):
        run.persist(60.0)
    assert 50 <= run.now_s <= 60 and 12 < len(run.timeouts) < 40


def test_who_is_told_to_stop_stops(monkeypatch):
    run = Run(monkeypatch, error(PeerError, **LOST))
    run.stop.set()
    with pytest.raises(PeerError):
        run.persist(60.0)
