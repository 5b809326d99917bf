"""Traces: idle time by its one definition, and the file that Perfetto opens."""

from __future__ import annotations

import gzip
import json

import pytest

from pipar_jax.errors import RunError
from pipar_jax.schedule import Action
from pipar_jax.trace import Interval, Timed, Trace, union_s


def row(kind: str, start_s: float, end_s: float, micro_batch: int = 0) -> Timed:
    return Timed(Action(0, kind, 0, 0, micro_batch), start_s, end_s, 10, 5)


def test_each_moment_counts_once():
    assert union_s([(0, 2), (1, 3), (5, 6)]) == 4
    assert union_s([(0, 10), (2, 3)]) == 10
    assert union_s([]) == 0
    assert union_s([(0, 4)], Interval(1, 2)) == 1
    assert union_s([(0, 1), (3, 9)], Interval(0.5, 4)) == 1.5


def test_sending_and_receiving_are_not_busy():
    trace = Trace()
    trace.add("d0", [row("F", 1, 3), row("SF", 3, 9), row("RB", 8, 9), row("B", 9, 10)])
    whole = Interval(0, 12)
    assert trace.busy_s("d0", whole) == 3
    assert trace.idle_share("d0", whole) == pytest.approx(0.75)
    assert trace.idle_share("server", whole) == 1.0


def test_a_host_is_brought_to_the_traces_clock():
    trace = Trace()
    trace.add("d0", [row("F", 1, 3)], offset_s=-1.0)
    assert trace.busy_s("d0", Interval(0, 1)) == 1


def test_a_trace_survives_its_file(tmp_path):
    trace = Trace(rounds=[Interval(0, 4)], meta={"method": "pipar"})
    trace.add("server", [row("L", 0.5, 1.25), row("U", 2, 3)])
    trace.add("d0", [row("SF", 0.25, 0.5, micro_batch=3)])
    trace.save(tmp_path / "t.json.gz")
    assert Trace.load(tmp_path / "t.json.gz") == trace


def test_the_file_is_in_the_chrome_trace_format(tmp_path):
    trace = Trace()
    trace.add("server", [row("L", 0.5, 1.25)])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    (event,) = [e for e in events if e["ph"] == "X"]
    assert (event["name"], event["ts"], event["dur"]) == ("d0.0L0@0", 500000.0, 750000.0)
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["server"]


def test_every_link_has_tracks_of_its_own(tmp_path):
    trace = Trace()
    for device in (1, 0):
        trace.add("server", [Timed(Action(1, kind, device, 0), 0, 1) for kind in ("RF", "L", "SB")])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["compute", "receive d0", "send d0", "receive d1", "send d1"]
    drawn = {e["name"]: names[e["tid"]] for e in events if e["ph"] == "X"}
    assert drawn["d1.1SB0@0"] == "send d1" and drawn["d0.1L0@0"] == "compute"


def test_an_arrow_leads_from_a_send_to_its_receive(tmp_path):
    trace = Trace()
    trace.add("d0", [Timed(Action(0, "SF", 0, 3, 1), 0.1, 0.2)])
    trace.add("server", [Timed(Action(1, "RF", 0, 3, 1), 0.15, 0.25)])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    (start,), (end,) = ([e for e in events if e["ph"] == ph] for ph in "sf")
    assert start["id"] == end["id"]
    assert (start["pid"], start["ts"], end["pid"], end["ts"]) == (0, 100000.0, 1, 250000.0)
    assert Trace.load(tmp_path / "t.json.gz") == trace


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no gzip", id="no gzip"),
        # gzip writes the time into its bytes, which would make names that workers do not share.
        pytest.param(gzip.compress(b"{}"), id="no list of events"),
        pytest.param(gzip.compress(b"[1]"), id="a number as an event"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(RunError, match="is not a trace"):
        Trace.load(tmp_path / "t")
