"""Traces: idle time by its one definition, and the file that Perfetto opens."""

from __future__ import annotations

import gzip
import json

import pytest

from pipar_jax.errors import RunError
from pipar_jax.roles.trace_log import TraceLog
from pipar_jax.schedule.actions import KIND_NAMES, KINDS, Action
from pipar_jax.schedule.trace import Interval, Timed, Trace, TraceWriter, read_rounds, union_s
from tests.disks import file_limit


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
    (event,) = [e for e in events if e["ph"] == "X" and e["cat"] != "round"]
    assert (event["ts"], event["dur"]) == (500000.0, 750000.0)
    assert event["args"] == {"device": 0, "stage": 0, "step": 0, "micro_batch": 0,
                             "bytes": 10, "samples": 5}  # fmt: skip
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rounds", "server"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_slices_of_a_kind_share_its_name(kind, tmp_path):
    trace = Trace()
    trace.add("d0", [row(kind, 1, 2), Timed(Action(0, kind, 1, 7), 2, 3)])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    slices = [event["name"] for event in events if event["ph"] == "X"]
    assert slices == [KIND_NAMES[kind]] * 2
    assert Trace.load(tmp_path / "t.json.gz") == trace


def test_no_two_kinds_share_a_name():
    assert set(KIND_NAMES) == KINDS
    assert len(set(KIND_NAMES.values())) == len(KINDS)


def test_every_link_has_tracks_of_its_own(tmp_path):
    trace = Trace()
    for device in (1, 0):
        trace.add("server", [Timed(Action(1, kind, device, 0), 0, 1) for kind in ("RF", "L", "SB")])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = dict(sorted((e["tid"], e["args"]["name"]) for e in events
                        if e["name"] == "thread_name"))  # fmt: skip
    assert list(names.values()) == ["compute", "receive d0", "send d0", "receive d1", "send d1"]
    drawn = {(e["args"]["device"], e["cat"]): names[e["tid"]] for e in events if e["ph"] == "X"}
    assert drawn[1, "SB"] == "send d1" and drawn[0, "L"] == "compute"


def test_an_arrow_leads_from_a_send_to_its_receive(tmp_path):
    trace = Trace()
    trace.add("d0", [Timed(Action(0, "SF", 0, 3, 1), 0.1, 0.2)])
    trace.add("server", [Timed(Action(1, "RF", 0, 3, 1), 0.15, 0.25)])
    trace.save(tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    (start,), (end,) = ([e for e in events if e["ph"] == ph] for ph in "sf")
    assert start["id"] == end["id"]
    assert (start["pid"], start["ts"], end["pid"], end["ts"]) == (1, 100000.0, 2, 250000.0)
    assert Trace.load(tmp_path / "t.json.gz") == trace


def rounds_of(folder, count):
    """Writes a file of several rounds, each with two steps of a device and the server."""
    writer = TraceWriter(folder / "t.json.gz", {"method": "pipar"})
    for index in range(count):
        for host, kind, stage in (("d0", "SF", 0), ("server", "RF", 1)):
            rows = [Timed(Action(stage, kind, 0, 2 * index + step, 0), index + 0.1 * step,
                          index + 0.1 * step + 0.05, 100, 5) for step in range(2)]  # fmt: skip
            writer.add(host, rows)
        writer.end_round(Interval(index, index + 1))
    return writer


def test_a_trace_that_is_cut_short_anywhere_is_read_up_to_its_last_whole_round(tmp_path):
    writer = rounds_of(tmp_path, 5)
    path = tmp_path / "t.json.gz"
    growing = path.read_bytes()  # of a run that goes on, or that was killed
    writer.close()
    whole = Trace.load(path)
    assert len(whole.rounds) == 5 and whole.meta == {"method": "pipar"}
    path.write_bytes(growing)
    assert Trace.load(path) == whole
    seen = set()
    for size in range(len(growing), 0, -1):
        path.write_bytes(growing[:size])
        try:
            found = Trace.load(path)
        except RunError:  # not even its first line is there
            found = Trace()
        count = len(found.rounds)
        seen.add(count)
        assert found.rounds == whole.rounds[:count]
        for host, rows in found.hosts.items():
            assert rows == whole.hosts[host][: 2 * count]
    assert seen == set(range(6))


def test_a_round_is_on_the_disk_when_it_has_ended_and_nothing_of_it_is_kept(tmp_path):
    writer = rounds_of(tmp_path, 3)
    assert [len(part.rounds) for part in read_rounds(tmp_path / "t.json.gz")] == [1, 1, 1]
    assert writer.unmatched == 0  # every send has met its receive
    for index in range(50):  # sends that never arrive are forgotten
        writer.add("d0", [Timed(Action(0, "SF", 0, 1000 + index, 0), 9, 10)])
        writer.end_round(Interval(9, 10))
    assert 0 < writer.unmatched <= 2
    writer.close()


def test_an_arrow_joins_what_was_told_a_round_apart(tmp_path):
    with TraceWriter(tmp_path / "t.json.gz", {}) as writer:
        writer.add("server", [Timed(Action(1, "RF", 0, 3, 1), 0.15, 0.25)])
        writer.end_round(Interval(0, 1))
        writer.add("d0", [Timed(Action(0, "SF", 0, 3, 1), 0.1, 0.2)])
        writer.end_round(Interval(1, 2))
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] in "sf"] == [100000.0, 250000.0]


@pytest.mark.parametrize(("wanted", "kept"), [("all", 10), ("ends", 6), ("none", 0)])
def test_a_run_keeps_the_rounds_that_are_wanted(wanted, kept, tmp_path):
    log = TraceLog(tmp_path / "t.json.gz", wanted, lost=pytest.fail)
    log.begin({}, 10, origin_s=100.0)
    for index in range(10):
        log.add("d0", [Timed(Action(0, "F", 0, index, 0), 50.0 + index, 50.5 + index)], 50.0)
        log.end_round(Interval(100.0 + index, 101.0 + index))
    log.add("d0", [Timed(Action(0, "SA", 0, 9, 0), 60.0, 61.0)], 50.0)  # after the last round
    log.close()
    if not kept:
        assert not (tmp_path / "t.json.gz").exists()
        return
    trace = Trace.load(tmp_path / "t.json.gz")
    rounds = list(range(10)) if kept == 10 else [0, 1, 2, 7, 8, 9]
    assert [one.start_s for one in trace.rounds] == rounds
    assert [one.action.step for one in trace.hosts["d0"]] == [*rounds, 9]
    assert [one.start_s for one in trace.hosts["d0"]] == [*rounds, 10]


def test_where_the_disk_takes_no_more_the_trace_ends_and_the_run_does_not(tmp_path):
    lost = []
    log = TraceLog(tmp_path / "t.json.gz", "all", lost.append)
    log.begin({}, 1000, origin_s=0.0)
    with file_limit(10_000):
        for index in range(1000):
            rows = [Timed(Action(0, "F", 0, index, 0), index + 1 / (7 + index), index + 1.0)]
            log.add("d0", rows, 0.0)
            log.end_round(Interval(index, index + 1))
        log.close()
    (error,) = lost
    assert "t.json.gz" in str(error) and "--config.run.dir" in str(error)
    assert 20 < len(Trace.load(tmp_path / "t.json.gz").rounds) < 1000


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
