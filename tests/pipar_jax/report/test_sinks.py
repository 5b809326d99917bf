"""Sinks: what they are told, TensorBoard's files, and how they fail."""

from __future__ import annotations

import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.sinks import Sinks, scalars
from tests.pipar_jax.runtime import support

ROUND = {
    "event": "round_finished", "round": 1, "epoch": 2.0, "seconds": 4.0, "loss": 0.5,
    "metrics": {"accuracy": 0.75}, "samples": 100, "idle": {"server": 0.25},
    "links": [{"source": "d0", "target": "server", "bytes": 10, "queue_s": 0.5,
               "credit_wait_s": 0.0}],
}  # fmt: skip
EVALUATED = {"event": "evaluated", "round": 1, "epoch": 2.0, "loss": 0.25,
             "metrics": {"accuracy": 0.875}}  # fmt: skip


class Mine:
    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.closed = folder, [], 0

    def write(self, event: dict[str, Any]) -> None:
        if event.get("loss") == "wrong":
            raise ValueError("no number")
        self.events.append(event["event"])

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Mine]:
    found: list[Mine] = []

    def make(folder: Path) -> Mine:
        found.append(Mine(folder))
        return found[-1]

    module = types.ModuleType("my_sinks")
    module.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_sinks", module)
    return found


def test_a_run_tells_a_sink_of_ones_own_what_metrics_jsonl_has(
    made: list[Mine], tmp_path: Path
) -> None:
    config = support.config(tmp_path, (17, 33), dtype="float32")
    config.run.sinks = "my_sinks:make"
    run = support.trained(config, (17, 33), support.model(dtype="float32"))
    (sink,) = made
    assert sink.folder == run.folder and sink.closed == 1
    assert sink.events == [event["event"] for event in run.metrics]
    assert sink.events[-1] == "run_finished"


def test_a_sink_that_fails_is_named_and_all_are_closed(made: list[Mine], tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"my_sinks:make of run\.sinks failed: ValueError: no number"),
        Sinks("my_sinks:make, my_sinks:make", tmp_path) as sinks,
    ):
        sinks.write({"event": "evaluated", "loss": "wrong"})
    assert [one.closed for one in made] == [1, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensorbored", "neither tensorboard nor"),
        ("a:b:c", "MODULE:FUNCTION"),
        ("a b:c", "'a b:c'"),
    ],
)
def test_what_names_no_sink_is_refused_with_the_configuration(text: str, says: str) -> None:
    config = Config()
    config.run.sinks = text
    with pytest.raises(ConfigError, match=says):
        resolve(config)


def test_what_cannot_be_imported_is_named_and_those_made_before_are_closed(
    made: list[Mine], tmp_path: Path
) -> None:
    for name in ("no_such_module:make", "my_sinks:nothing"):
        with pytest.raises(ConfigError, match=rf"the sink {name} of run\.sinks cannot be imported"):
            Sinks(f"my_sinks:make,{name}", tmp_path)
    assert [one.closed for one in made] == [1, 1]


def test_numbers_have_names() -> None:
    assert scalars(EVALUATED) == {"test/accuracy": 0.875, "test/loss": 0.25}
    assert scalars({"event": "listening"}) == {}
    assert scalars(ROUND) == {
        "train/loss": 0.5, "train/accuracy": 0.75, "round/seconds": 4.0,
        "round/samples_per_s": 25.0, "round/epoch": 2.0, "idle/server": 0.25,
        "bytes/d0-server": 10, "queue_s/d0-server": 0.5, "credit_wait_s/d0-server": 0.0,
    }  # fmt: skip


def test_tensorboard_gets_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    from tensorboardX.proto.event_pb2 import Event

    with Sinks("tensorboard", tmp_path) as sinks:
        for event in (ROUND, EVALUATED, {"event": "run_finished"}):
            sinks.write(json.loads(json.dumps(event)))
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, a record, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    expected = {**scalars(ROUND), **scalars(EVALUATED)}
    assert found == {name: (2, value) for name, value in expected.items()}


def test_a_missing_library_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'pipar-jax\[tensorboard\]'"):
        Sinks("tensorboard", tmp_path)
