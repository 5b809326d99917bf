"""Links and other things that change over time, from CSV files."""

from __future__ import annotations

import pytest

from comms import ChannelError, parse_link
from comms.emulation.shaping import Shaper
from comms.emulation.timetable import read_timetable

GOOD = "# a drive\ntime_s,up_mbps,down_mbps\n0,8,16\n\n2,4,4\n5.5,80,160\n"


def test_a_trace_is_a_link_whose_rates_follow_it(tmp_path):
    file = tmp_path / "Drive.csv"
    file.write_text(GOOD)
    up, down = parse_link(f"trace:{file}")
    assert [up.rate_at(t) for t in (0, 1.9, 2, 5.4, 6, 99)] == [8, 8, 4, 4, 80, 80]
    assert [down.rate_at(t) for t in (0, 3, 7)] == [16, 4, 160]
    assert up.opening == parse_link("8/16")[0]
    # 1 MB from the start: 2 s at 8 Mbit/s hold it just; another one takes its time at 4.
    shaper = Shaper(up, 100.0)
    assert shaper.admit(100.0, 2_000_000, False) == (100.0, 102.0)
    assert shaper.admit(102.0, 1_000_000, True) == (102.0, 104.0)


def test_columns_may_stand_in_any_order(tmp_path):
    file = tmp_path / "slow.csv"
    file.write_text("slowdown, time_s\n1.5,0\n3,10\n")
    assert read_timetable(file, ("slowdown",)) == [(0.0, 1.5), (10.0, 3.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: its first line must be time_s,up_mbps,down_mbps"),
        ("time_s,up_mbps\n0,1\n", r"line 1: the columns must be time_s,up_mbps,down_mbps"),
        ("time_s,up_mbps,down_mbps\n", "has no rows"),
        ("time_s,up_mbps,down_mbps\n1,5,5\n", "line 2: the first time must be 0, got 1"),
        ("time_s,up_mbps,down_mbps\n0,5,5\n3,5,5\n3,6,6\n", "line 4: times must rise, got 3"),
        ("time_s,up_mbps,down_mbps\n0,5,fast\n", "line 2: down_mbps is 'fast', expected a number"),
        ("time_s,up_mbps,down_mbps\n0,nan,5\n", "line 2: up_mbps is 'nan', expected a finite"),
        ("time_s,up_mbps,down_mbps\n0,5\n", "line 2: expected 3 fields, got 2"),
        ("time_s,up_mbps,down_mbps\n0,5,5\n4,0,5\n", r"rates must be positive, got \[0.0, 5.0\]"),
    ],
)
def test_a_trace_that_cannot_be_used_says_where(tmp_path, text, message):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ChannelError, match=message):
        parse_link(f"trace:{file}")


def test_a_trace_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ChannelError, match=r"nowhere.csv cannot be read"):
        parse_link(f"trace:{tmp_path / 'nowhere.csv'}")
