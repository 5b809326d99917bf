"""Logs: lines with time stamps, and none about hardware that nobody asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from pipar_jax.report import logs
from pipar_jax.report.event_lines import LINES

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} [A-Z] [\w.]+: ")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    root, jax = logging.getLogger(), logging.getLogger("jax._src.xla_bridge")
    before = root.handlers[:], root.level, logs.LOG.level, jax.filters[:]
    yield
    root.handlers[:], root.level, logs.LOG.level, jax.filters[:] = before
    root.setLevel(before[1])
    logs.LOG.setLevel(before[2])


def test_an_event_is_a_line_with_a_time_stamp(capfd: pytest.CaptureFixture[str]) -> None:
    logs.begin()
    logs.note_event(
        {"event": "evaluated", "metrics": {"accuracy": 0.123456}, "idle": {"d0": 1}, "epoch": 2}
    )
    logs.note_event({"event": "progress", "step": 1})
    logging.getLogger("somebody").info("else")
    logging.getLogger("somebody").warning("warns")
    first, second = capfd.readouterr().err.splitlines()
    assert STAMP.match(first) and first.endswith(" I pipar_jax: evaluated epoch=2 accuracy=0.1235")
    assert STAMP.match(second) and second.endswith(" W somebody: warns")


def test_a_warning_to_a_user_is_its_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.begin()  # as a library may have done
    logs.begin_plain()
    logging.getLogger("pipar_jax.data.download").warning("downloading %s", "a file")
    logging.getLogger("somebody").info("nothing")
    assert capsys.readouterr().err == "downloading a file\n"


def test_a_missing_tpu_is_not_told_and_a_missing_gpu_is(capfd: pytest.CaptureFixture[str]) -> None:
    logs.begin()
    logs.leave_out_tpu()
    jax = logging.getLogger("jax._src.xla_bridge")
    jax.warning("Unable to initialize backend 'tpu': INTERNAL: no libtpu.so")
    jax.warning("A Google TPU may be present on this machine, but …")
    jax.warning("An NVIDIA GPU may be present on this machine, but …")
    (line,) = capfd.readouterr().err.splitlines()
    assert "NVIDIA" in line


def test_warnings_of_a_device_are_told_to_whoever_started_it() -> None:
    told: list[dict[str, object]] = []
    log = logging.getLogger("a device's own")
    log.setLevel(logging.INFO)
    handler = logs.EventHandler("d1", told.append)
    log.addHandler(handler)
    try:
        log.info("%s", "nothing")
        log.warning("d1: none of %d", 100)
    finally:
        log.removeHandler(handler)
    assert told == [{"event": "warning", "host": "d1", "text": "d1: none of 100"}]
    assert LINES["warning"](told[0]) == "d1: none of 100 (known on the device alone)"


def test_a_run_that_was_asked_to_end_says_so() -> None:
    line = LINES["interrupted"]({"event": "interrupted", "rounds": 3})
    assert line == "ends as it was asked to, with a checkpoint after round 3"
