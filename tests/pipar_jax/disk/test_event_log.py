"""metrics.jsonl: rows that are whole, of one run, and readable after whatever ended it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipar_jax.disk.event_log import EventLog, read_events
from pipar_jax.errors import DiskError, RunError
from pipar_jax.roles.run_folder import Record, RunFolder
from tests.disks import file_limit, full_disk


def row(number: int) -> dict[str, object]:
    return {"event": "round_finished", "round": number, "text": "x" * 100}


def test_a_row_that_cannot_be_written_leaves_nothing_of_itself(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "metrics.jsonl")
    with file_limit(1000), pytest.raises(DiskError, match=r"metrics.jsonl.*--config.run.dir"):
        for number in range(100):
            log.add(row(number))
    kept = len(read_events(log.path))
    assert 3 < kept < 10
    log.add(row(kept))  # there is space again
    assert [one["round"] for one in read_events(log.path)] == list(range(kept + 1))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with full_disk(tmp_path, kilobytes=8) as disk:
        log = EventLog(disk / "metrics.jsonl")
        with pytest.raises(DiskError, match="no space left on the disk while writing"):
            for number in range(1000):
                log.add(row(number))
        assert len(read_events(log.path)) > 20


@pytest.mark.parametrize("torn", ['{"event": "half', "{", '{"event": 1}', "\x00\x00"])
def test_a_torn_last_line_is_read_over_and_no_other(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a"}\n' + torn)
    assert [one["event"] for one in read_events(path)][:1] == ["a"]
    assert len(read_events(path)) == (2 if torn == '{"event": 1}' else 1)
    if torn != '{"event": 1}':
        path.write_text('{"event": "a"}\n' + torn + '\n{"event": "b"}\n')
        with pytest.raises(RunError, match=r"metrics.jsonl:2 is not a row of events"):
            read_events(path)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").add_event({"event": "a"})
    with pytest.raises(RunError, match=r"belongs to another run.*--config.name"):
        RunFolder(tmp_path / "run")
    assert len(read_events(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("unkept", [(), ("run_started",)], ids=["a new run", "a resumed one"])
def test_before_training_a_full_disk_ends_the_run_and_later_it_is_told_once(
    tmp_path: Path, unkept: tuple[str, ...]
) -> None:
    """A run that is resumed has kept before that it begins to train, and it begins all the same."""
    folder = RunFolder(tmp_path / "run")
    record = Record(folder, unkept)
    with file_limit(0), pytest.raises(DiskError):
        record.add({"event": "evaluated"})
    assert record.add({"event": "run_started"}) is None
    with file_limit(0):
        told = record.add({"event": "round_finished"})
        assert told is not None and told["event"] == "not_kept"
        assert "metrics.jsonl" in told["reason"] and "--config.run.dir" in told["reason"]
        assert record.add({"event": "round_finished"}) is None
    assert record.add({"event": "evaluated"}) is None  # there is space again
    with pytest.raises(DiskError, match=r"weights.safetensors is saved, but 2 rows of metrics"):
        record.check()
    begun = [] if unkept else ["run_started"]
    rows = read_events(folder.path / "metrics.jsonl")
    assert [one["event"] for one in rows] == [*begun, "evaluated"]
