"""When a round is over: every rule of the configuration, at every time and number of devices."""

from __future__ import annotations

import itertools

import pytest

from pipar_jax.config import Config
from pipar_jax.roles.round_end import RoundEnd, Verdict

WAIT, COMMIT, BELOW = Verdict.WAIT, Verdict.COMMIT, Verdict.BELOW


def round_end(count: int = 4, **fields) -> RoundEnd:
    config = Config()
    for name, value in fields.items():
        setattr(config.cohort, name, value)
    return RoundEnd(config.cohort, tuple(range(count)), 100.0)


@pytest.mark.parametrize(
    ("fields", "done", "lost", "after_s", "expected"),
    [
        ({}, 3, 0, 1e6, WAIT),
        ({}, 4, 0, 0, COMMIT),
        ({}, 3, 1, 0, BELOW),
        ({"quorum": 2}, 3, 0, 1e6, WAIT),
        ({"quorum": 2}, 3, 1, 0, COMMIT),
        ({"quorum": 2}, 2, 1, 0, WAIT),
        ({"quorum": 2}, 0, 3, 0, BELOW),
        ({"quorum": 2, "deadline_s": 5}, 2, 0, 4, WAIT),
        ({"quorum": 2, "deadline_s": 5}, 2, 0, 6, COMMIT),
        ({"quorum": 2, "deadline_s": 5}, 1, 0, 6, BELOW),
        ({"deadline_s": 5}, 3, 0, 6, BELOW),
        ({"quorum": 2, "deadline_s": 5, "below": "wait", "wait_s": 3}, 1, 0, 7, WAIT),
        ({"quorum": 2, "deadline_s": 5, "below": "wait", "wait_s": 3}, 2, 0, 7, COMMIT),
        ({"quorum": 2, "deadline_s": 5, "below": "wait", "wait_s": 3}, 1, 0, 9, BELOW),
        ({"first": 2}, 2, 0, 0, COMMIT),
        ({"first": 2}, 1, 2, 0, WAIT),
        ({"first": 2}, 1, 3, 0, BELOW),
    ],
)
def test_a_round_ends_as_the_configuration_says(fields, done, lost, after_s, expected):
    made = round_end(**fields)
    made.done, made.lost = set(range(done)), set(range(4 - lost, 4))
    assert made.verdict(100.0 + after_s) is expected


def test_whatever_happens_a_round_with_a_deadline_ends():
    for below, quorum, first in itertools.product(("end", "repeat", "wait"), (0, 1, 3), (0, 3)):
        for done, lost in itertools.product(range(4), range(4)):
            made = round_end(below=below, quorum=quorum, first=first, deadline_s=5, wait_s=2)
            made.done, made.lost = set(range(done)), set(range(max(done, 4 - lost), 4))
            assert made.verdict(made.ends_s()) is not WAIT
