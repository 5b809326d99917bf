"""A script is read as it was written; one that does not fit is refused in one line."""

from __future__ import annotations

import json

import pytest

from pipar_jax.config import Config
from pipar_jax.config.cohorts import planned
from pipar_jax.config.membership_script import Attempt, Out, read_script
from pipar_jax.errors import ConfigError
from pipar_jax.methods.resolution import resolve

ATTEMPTS = (
    Attempt(0, (0, 1), ((0, 0, 5), (1, 0, 5)), (0, 1), (Out(1, 0, "lost"),), (0,)),
    Attempt(1, (0, 1), ((0, 5, 10), (1, 0, 5)), (1,), (Out(0, 5, "undone"), Out(1, 0, "late")), ()),
    Attempt(1, (0, 1), ((0, 5, 10), (1, 0, 5)), (), (), (0, 1)),
)


def written(tmp_path, *changes):
    """Writes the attempts, some fields of some lines changed."""
    rows = [one.to_dict() for one in ATTEMPTS]
    for line, field, value in changes:
        rows[line][field] = value
    path = tmp_path / "membership.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_was_written_is_read(tmp_path):
    assert read_script(written(tmp_path), 2, 2) == ATTEMPTS


@pytest.mark.parametrize(
    ("line", "field", "value", "says"),
    [
        (0, "round", 1, "line 1: round 1, expected 0"),
        (2, "round", 2, "line 3: round 2, expected 1"),
        (0, "round", True, "True is not a whole number"),
        (0, "cohort", [0], "line 1: a cohort of 1 devices, expected 2"),
        (0, "cohort", [0, 0], "line 1: a cohort of 2 devices, expected 2"),
        (1, "cohort", [0, 7], "line 2: device 7, expected 0 to 1"),
        (0, "commit", [5], "line 1: place 5, which takes no step"),
        (0, "spans", [], "line 1: place none"),
        (0, "spans", [[0, 5]], "a span is a place and two steps"),
        (0, "spans", [[0, 5, 2], [1, 0, 5]], "a span that no place can have"),
        (0, "out", [{"place": 1, "step": 0, "why": "tired"}], "for a reason"),
        (0, "out", "x", "line 1: not an attempt at a round"),
        (2, "commit", [], "does not end with a round that counts"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, line, field, value, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_script(written(tmp_path, (line, field, value)), 2, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\n", '{"round": 0}\n'])
def test_what_is_no_script_is_one_line(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    config = Config()
    config.cohort.script = str(path)
    with pytest.raises(ConfigError, match=r"cohort\.script=.*x\.jsonl"):
        planned(resolve(config).cohort, config.devices.count)
