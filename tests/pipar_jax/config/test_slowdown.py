"""Emulated slowness that changes over a run, and configurations that name files of changes."""

from __future__ import annotations

import pytest

from pipar_jax.config import Config
from pipar_jax.config.slowdown import UNSLOWED, Slowdown, read_slowdown
from pipar_jax.errors import ConfigError
from pipar_jax.methods.resolution import resolve


def test_a_file_multiplies_the_factor_over_time(tmp_path):
    file = tmp_path / "slow.csv"
    file.write_text("time_s,slowdown\n0,1\n10,4\n20,1.5\n")
    made = read_slowdown(2.0, str(file), "slowdown_trace")
    assert [made.at(t) for t in (0, 9.9, 10, 19, 20, 1000)] == [2, 2, 8, 8, 3, 3]
    assert made.since(None) == 2
    assert made.emulated
    assert not UNSLOWED.emulated
    assert Slowdown(3.0).emulated
    assert read_slowdown(1.0, "", "slowdown_trace") == UNSLOWED


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "slowdown_trace",
            "nowhere.csv",
            r"devices.1.slowdown_trace='/.*nowhere.csv': /.*nowhere.csv",
        ),
        (
            "link",
            "trace:nowhere.csv",
            r"devices.1.link='trace:/.*nowhere.csv': /.*nowhere.csv cannot",
        ),
    ],
)
def test_a_configuration_that_names_no_file_is_refused(field, value, message):
    made = Config()
    made.devices.overrides = {1: {field: value}}
    with pytest.raises(ConfigError, match=message):
        resolve(made)


def test_a_device_cannot_become_faster_than_it_is(tmp_path):
    file = tmp_path / "slow.csv"
    file.write_text("time_s,slowdown\n0,0.5\n")
    made = Config()
    made.devices.defaults.slowdown_trace = str(file)
    with pytest.raises(ConfigError, match=r"must be at least 1, got 0.5 at 0 s"):
        resolve(made)
