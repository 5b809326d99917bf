"""Cohorts: every registered way chooses what is there, seeded; a user's function is held to it."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest

from pipar_jax.config import SELECTIONS, Config
from pipar_jax.errors import ConfigError
from pipar_jax.roles.selection import Candidate, CohortChooser

CANDIDATES = [Candidate(device, 10 * (device + 1), 0) for device in (9, 4, 7, 1, 2)]


def chooser(select: str, size: float = 3.0, seed: int = 0) -> CohortChooser:
    config = Config(seed=seed)
    config.devices.count = 10
    config.cohort.size, config.cohort.select = size, select
    return CohortChooser(config.cohort, config.devices.count, config.seed)


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_way_to_choose_is_a_function_of_seed_round_and_who_is_there(select):
    made = chooser(select)
    drawn = [made.choose(r, 0, CANDIDATES) for r in range(40)]
    assert drawn == [chooser(select).choose(r, 0, CANDIDATES[::-1]) for r in range(40)]
    assert len(set(drawn)) > 4
    assert drawn != [chooser(select, seed=1).choose(r, 0, CANDIDATES) for r in range(40)]
    assert drawn != [made.choose(r, 1, CANDIDATES) for r in range(40)]
    for one in drawn:
        assert list(one) == sorted(set(one)) and set(one) <= {1, 2, 4, 7, 9} and len(one) == 3


@pytest.mark.parametrize("select", SELECTIONS)
def test_fewer_than_wanted_are_all_of_them(select):
    assert chooser(select, 8.0).choose(0, 0, CANDIDATES) == (1, 2, 4, 7, 9)
    assert chooser(select, 0.0).choose(0, 0, CANDIDATES) == (1, 2, 4, 7, 9)


def test_more_samples_are_chosen_more_often():
    made = chooser("by_samples", 1.0)
    often = np.bincount([made.choose(r, 0, CANDIDATES)[0] for r in range(600)], minlength=10)
    assert often[9] > 2 * often[1] and often[1] > 0


OWN = """
def good(candidates, count, draws):
    return [one.device for one in candidates][-count:]
def strange(candidates, count, draws):
    return [1, 2, 5]
def twice(candidates, count, draws):
    return [1, 2, 2]
def few(candidates, count, draws):
    return [1]
def number(candidates, count, draws):
    return 3
def half(candidates, count, draws):
    return [1, 2, 4.5]
"""


@pytest.fixture
def own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_selection.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_selection", None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("strange", "device 5, which is not among the 5"),
        ("twice", "device 2 twice"),
        ("few", "returned 1 devices, expected 3"),
        ("number", "returned 3, expected 3 indices"),
        ("half", "4.5"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_users_function_is_held_to_what_it_was_asked_for(name, says, own):
    with pytest.raises(ConfigError, match=rf"module:own_selection:{name} .*{says}"):
        chooser(f"module:own_selection:{name}").choose(0, 0, CANDIDATES)


def test_a_users_function_chooses(own):
    assert chooser("module:own_selection:good").choose(0, 0, CANDIDATES) == (4, 7, 9)
