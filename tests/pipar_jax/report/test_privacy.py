"""What a report says of private runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipar_jax.config import Config, to_json
from pipar_jax.report.privacy import privacy_text
from pipar_jax.report.run import RecordedRun, read_run

PROMISE = {"event": "private", "words": ["a < b", "c"], "noise": {"d0": 2.0}, "epsilon": {}}
ROW = {"event": "round_finished", "round": 3, "epsilon": {"d0": 1.25, "d1": 2.5}, "delta": 1e-5}


def recorded(folder: Path, *events: dict[str, object]) -> RecordedRun:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(Config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return read_run(folder)


def test_a_report_says_what_is_protected_and_what_was_used(tmp_path: Path) -> None:
    runs = [recorded(tmp_path / "plain"), recorded(tmp_path / "private", PROMISE, ROW)]
    text = privacy_text(runs, ["plain", "private"])
    assert text.count("<p>") == 1 and "private: a &lt; b; c." in text
    assert "After round 4 epsilon is at most 2.5 (device d1) at delta 1e-05." in text
    assert "clip" not in text


@pytest.mark.parametrize(("share", "said"), [(0.4, "40%"), (None, "0%")])
def test_a_report_says_where_a_clip_came_to(share: float | None, said: str, tmp_path: Path) -> None:
    row = {**ROW, "clip": 0.125, "within_clip": share}
    text = privacy_text([recorded(tmp_path / "run", PROMISE, row)], ["one"])
    assert f"The clip came to 0.125; {said} of the last updates were within" in text
