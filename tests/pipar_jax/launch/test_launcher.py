"""The launcher with real processes: events, first errors, Ctrl-C, no orphan however it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from pipar_jax.config import Config, from_json
from pipar_jax.disk.files import write_tensors
from pipar_jax.errors import ConfigError, DataError, PeerError, RunError
from pipar_jax.launch import launcher, run_folders
from pipar_jax.launch.run_folders import hold_folder
from pipar_jax.methods.resolution import resolve
from tests.conftest import Within
from tests.patience import PATIENCE_S

MODULE = "tests.pipar_jax.fake_hosts"
ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    made = Config(name="trial")
    made.run.dir = str(tmp_path / "runs")
    made.data.cache_dir = str(tmp_path / "cache")
    return made


def launch(config: Config, monkeypatch: pytest.MonkeyPatch, **acts: str) -> list[dict[str, Any]]:
    """Launches fake hosts; returns the events, the launcher's own answer last."""
    events: list[dict[str, Any]] = []
    named = {name.replace("_", " "): act for name, act in acts.items()}
    monkeypatch.setenv("FAKE_HOSTS", json.dumps(named))
    events.append(launcher.launch(config, on_event=events.append, process_module=MODULE))
    return events


def alive(runs: pathlib.Path) -> list[int]:
    """Returns the hosts that noted their number and still live."""
    pids = [int(path.read_text()) for path in runs.glob("*.pid")]
    return [pid for pid in pids if psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE]


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def test_a_run_passes_on_events_and_leaves_its_folder(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.devices.count = 3
    events = launch(config, monkeypatch)
    assert [event["event"] for event in events[:3]] == ["listening", "run_started", "run_finished"]
    folder = pathlib.Path(events[-1]["folder"])
    assert events[-1]["metrics"] == {"accuracy": 0.5} and folder.name == "trial"
    assert from_json((folder / "config.json").read_text()).devices.count == 3
    logs = sorted(path.name for path in (folder / "logs").iterdir())
    assert logs == ["d0.log", "d1.log", "d2.log", "server.log"]
    assert not alive(folder.parent)


def test_a_second_run_of_the_name_gets_a_number(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [pathlib.Path(launch(config, monkeypatch)[-1]["folder"]).name for _ in range(2)]
    assert names == ["trial", "trial-2"]
    saved = pathlib.Path(config.run.dir) / "trial-2" / "config.json"
    assert from_json(saved.read_text()).name == "trial-2"
    assert config.name == "trial"  # the caller's is left alone


def test_a_second_run_in_one_folder_is_refused_while_the_first_lasts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folders, "ENDING_S", 0.2)
    config.run.resume = "auto"
    with hold_folder(resolve(config)) as held:
        events = held.path / "config.json"
        before = events.stat()
        says = rf"runs/trial is in use by another run \(process {os.getpid()}\): wait for its end"
        with pytest.raises(RunError, match=says):
            launch(config, monkeypatch)
        assert events.stat() == before
    assert launch(config, monkeypatch)[-1]["event"] == "run_finished"
    assert not alive(pathlib.Path(config.run.dir))


def test_the_environment_is_set_before_jax_could_be_loaded(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = min(os.sched_getaffinity(0))
    config.server.cpus, config.server.platform = str(core), "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    started = launch(config, monkeypatch)[1]
    assert started["cpus"] == [core] and started["platforms"] == "cpu"


def test_the_token_reaches_the_hosts_and_no_file(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.network.token = "open sesame"
    events = launch(config, monkeypatch)
    assert events[1]["token_hash"] == hashlib.sha256(b"open sesame").hexdigest()
    for path in pathlib.Path(config.run.dir).rglob("*.*"):
        assert path.is_dir() or b"sesame" not in path.read_bytes()


FAILURES = [
    # what the hosts do, the error that must be raised, and what it must say
    ({"d1": "killed"}, RunError, r"d1 was ended by SIGKILL \(killed by a user.*d1\.log"),
    ({"server": "killed"}, RunError, r"server was ended by SIGKILL"),
    pytest.param(
        {"d1": "killed by a number"},
        RunError,
        r"d1 was ended by signal 63; log: ",
        marks=pytest.mark.skipif(signal.NSIG < 64, reason="there are no signals for real time"),
    ),
    ({"d0": "config error"}, ConfigError, r"^d0: pipeline\.cut=7 is beyond the last unit"),
    ({"server_before_listening": "config error"}, ConfigError, r"^server: pipeline\.cut=7"),
    ({"server": "full disk"}, RunError, r"no space left on the disk while writing metrics\.jsonl"),
    ({"d0": "fault"}, RunError, r"^d0: unexpected ValueError: two \(traceback in .*d0\.log\)"),
    ({"d1": "dies talking"}, RunError, r"d1 ended with code 7.*its last line: last words"),
    ({"server": "returns", "d0": "hangs"}, RunError, r"server ended|did not end"),
    ({"d1_at_the_end": "hangs"}, RunError, r"d1 did not end within network\.deadline_s=2 s"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("acts", "kind", "says"), FAILURES, ids=lambda one: str(one) if isinstance(one, dict) else "-"
)
def test_the_first_real_error_is_raised_in_one_line_and_in_time(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    acts: dict[str, str],
    kind: type,
    says: str,
    within: Within,
) -> None:
    config.network.deadline_s = 2.0
    # All hosts tell what happened, in their own time, but those that hang, and those that wait for
    # a server that never listens.
    if "hangs" not in acts.values() and "server_before_listening" not in acts:
        monkeypatch.setattr(launcher, "GRACE_S", PATIENCE_S)
    with within(20.0), pytest.raises(kind, match=says) as caught:
        launch(config, monkeypatch, **acts)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, PeerError)  # that is what the peers of the host saw
    assert not alive(pathlib.Path(config.run.dir))


def test_a_run_that_may_lose_devices_goes_on_without_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.devices.count, config.cohort.quorum = 3, 2
    events = launch(config, monkeypatch, d1_at_the_end="killed", d2_at_the_end="fault")
    assert events[-1]["event"] == "run_finished"
    assert not alive(pathlib.Path(config.run.dir))


@pytest.mark.parametrize(
    ("acts", "says"),
    [
        ({"d0": "killed", "d1": "killed"}, "d[01] was ended by SIGKILL"),
        ({"d0_at_the_end": "killed", "server_at_the_end": "killed"}, "server was ended by SIGKILL"),
    ],
)
def test_it_ends_with_its_server_or_its_last_device(
    config: Config, monkeypatch: pytest.MonkeyPatch, acts: dict[str, str], says: str
) -> None:
    config.cohort.quorum = 1
    with pytest.raises(RunError, match=says):
        launch(config, monkeypatch, **acts)
    assert not alive(pathlib.Path(config.run.dir))


def test_what_a_host_printed_stays_in_its_log_and_in_the_note(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError) as caught:
        launch(config, monkeypatch, d0="fault")
    log = (pathlib.Path(config.run.dir) / "trial" / "logs" / "d0.log").read_text()
    assert "Traceback" in log and "ValueError: two\nlines" in log
    assert "ValueError: two\nlines" in caught.value.__notes__[0]


def test_what_a_host_reported_is_told_where_its_log_is_gone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pathlib.Path.read_text

    def gone(path: pathlib.Path, *args: Any, **named: Any) -> str:
        if path.name == "d0.log":
            path.unlink(missing_ok=True)
        return read(path, *args, **named)

    monkeypatch.setattr(pathlib.Path, "read_text", gone)
    with pytest.raises(RunError, match="unexpected ValueError: two") as caught:
        launch(config, monkeypatch, d0="fault")
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("group", ["run.resume", "model.weights"])
def test_where_a_run_starts_from_is_read_before_any_other_host_starts(
    config: Config, monkeypatch: pytest.MonkeyPatch, group: str, tmp_path: pathlib.Path
) -> None:
    if group == "run.resume":
        config.run.resume = "auto"
    else:
        config.model.weights = str(tmp_path / "x.safetensors")
        write_tensors(config.model.weights, {"a/b": np.zeros(1, np.float32)}, {})
    with pytest.raises(ConfigError, match=r"^server: pipeline\.cut=7"):
        launch(config, monkeypatch, server_before_listening="config error")
    logs = pathlib.Path(config.run.dir) / "trial" / "logs"
    assert [path.name for path in logs.iterdir()] == ["server.log"]
    assert launch(config, monkeypatch)[-1]["event"] == "run_finished"


def test_a_server_that_never_listens_ends_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.network.join_timeout_s = 1.5
    with pytest.raises(RunError, match=r"did not listen within network\.join_timeout_s=1\.5 s"):
        launch(config, monkeypatch, server_before_listening="hangs")
    assert not alive(pathlib.Path(config.run.dir))


def test_cores_that_are_not_there_are_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.devices.overrides[1] = {"cpus": "4000"}
    with pytest.raises(ConfigError, match=r"devices\.1\.cpus='4000' includes cores"):
        launch(config, monkeypatch)


def test_missing_data_end_the_run_before_a_process_starts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.data.source, config.data.data_dir = "mnist", config.run.dir
    config.data.download = False
    with pytest.raises(DataError, match="neither prepared by TFDS"):
        launch(config, monkeypatch)
    assert not pathlib.Path(config.run.dir).exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_data_are_read(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    config.data.source, config.data.data_dir = "mnist", str(tmp_path)  # where there is none
    config.data.download = False
    for place in ("file", "file/runs"):
        config.run.dir = str(tmp_path / place)
        with pytest.raises(ConfigError, match=rf"^run\.dir='.*{place}' "):
            launch(config, monkeypatch)


def test_the_folder_of_a_run_that_goes_on_is_looked_at_where_it_is(
    config: Config, tmp_path: pathlib.Path
) -> None:
    config = resolve(config)
    run_folders.check_place(config)
    pathlib.Path(config.run.dir).write_text("")
    with pytest.raises(ConfigError, match=r"^run\.dir=.* is a file: name a folder"):
        run_folders.check_place(config)
    config.run.resume = str(tmp_path / "elsewhere")  # whose folder is the one to be written
    run_folders.check_place(config)
    assert not (tmp_path / "elsewhere").exists()


def test_an_error_of_the_listener_to_events_ends_all(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(event: dict[str, Any]) -> None:
        raise ZeroDivisionError(event["event"])

    monkeypatch.setenv("FAKE_HOSTS", json.dumps({"d0": "hangs"}))
    with pytest.raises(ZeroDivisionError):
        launcher.launch(config, on_event=break_down, process_module=MODULE)
    assert not alive(pathlib.Path(config.run.dir))


PARENT = """
import sys
from pipar_jax.launch import launcher, run_folders
from pipar_jax.launch.run_folders import hold_folder
from pipar_jax.methods.resolution import resolve
from pipar_jax.config import from_json
config = from_json(sys.stdin.read())
launcher.launch(config, process_module=sys.argv[1])
"""


@contextlib.contextmanager
def started_parent(config: Config, **acts: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that launches fake hosts, waits until all live, and ends it afterwards."""
    from pipar_jax.config import to_json

    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, MODULE],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FAKE_HOSTS": json.dumps(acts)},
    )
    try:
        assert parent.stdin is not None
        parent.stdin.write(to_json(config))
        parent.stdin.close()
        parent.stdin = None  # so that communicate leaves it alone
        runs, patience_s = pathlib.Path(config.run.dir), time.monotonic() + PATIENCE_S
        while len(list(runs.glob("*.pid"))) < config.devices.count + 1:
            assert time.monotonic() < patience_s and parent.poll() is None
            time.sleep(0.02)
        yield parent
    finally:
        parent.kill()
        parent.communicate(timeout=PATIENCE_S)


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize(
    ("number", "act"),
    [
        (signal.SIGINT, "hangs"),
        (signal.SIGTERM, "hangs deaf"),
        (signal.SIGKILL, "hangs deaf"),
        *(
            pytest.param(number, act, marks=pytest.mark.soak)
            for number, act in (
                (signal.SIGINT, "hangs deaf"),
                (signal.SIGTERM, "hangs"),
                (signal.SIGKILL, "hangs"),
            )
        ),
    ],
)
def test_no_host_outlives_the_launcher(
    config: Config, number: signal.Signals, act: str, within: Within
) -> None:
    with started_parent(config, d0=act, d1=act) as parent:
        runs = pathlib.Path(config.run.dir)
        with within(20.0):
            parent.send_signal(number)
            assert parent.wait(timeout=PATIENCE_S) != 0
            while alive(runs):
                time.sleep(0.02)


def test_ctrl_c_in_a_terminal_reaches_the_launcher_only(config: Config) -> None:
    runs = pathlib.Path(config.run.dir)
    with started_parent(config, d0="hangs", d1="hangs") as parent:
        pids = alive(runs)
        assert len(pids) == 3
        assert all(os.getpgid(pid) != os.getpgid(parent.pid) for pid in pids)
    while alive(runs):
        time.sleep(0.02)
