"""experiments.train as users start it: short runs of each method, and everything that ends one."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from pipar_jax.methods.registry import server_methods
from tests.conftest import Within
from tests.experiments.running import LONG, ROOT, all_gone, soaked, started
from tests.patience import PATIENCE_S

#: Seconds within which a fault must have ended everything.
BOUND_S = 10.0
#: Labels at home, a compute node between the two stages of each device.
CHAIN = ("--config.method=mpsl", "--config.nodes.count=1", "--config.pipeline.cuts=1,2")
PREPARED = ROOT.parent / "shared" / "data" / "tfds"


def short(tmp_path: pathlib.Path, *arguments: str) -> list[str]:
    return [
        "--config=digits",
        "--config.model.name=mlp",
        "--config.epochs=1",
        "--config.data.train_samples=64",
        "--config.data.test_samples=50",
        f"--config.run.dir={tmp_path}",
        *arguments,
    ]


def long(tmp_path: pathlib.Path, *arguments: str) -> list[str]:
    return ["--config=digits", *LONG, f"--config.run.dir={tmp_path}", *arguments]


# Split learning: below, on data of devices' own.
@pytest.mark.parametrize(
    "method", ["pipar", *soaked(*(name for name in server_methods() if name != "pipar"))]
)
def test_a_short_run_ends_well_and_leaves_its_folder(tmp_path: pathlib.Path, method: str) -> None:
    _, output = assert_ends_well(method, tmp_path)
    assert "device  samples" in output


def assert_ends_well(
    method: str, tmp_path: pathlib.Path, *arguments: str
) -> tuple[list[dict[str, Any]], str]:
    """Runs a method and looks at all that it leaves; returns its events and its output."""
    with started("train", *short(tmp_path, f"--config.method={method}", *arguments)) as train:
        assert train.wait() == 0, train.output
        assert f"{method}: " in train.lines[-1] and "test accuracy" in train.lines[-1]
        assert "method=" + method in train.output
    folder = tmp_path / "digits"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "weights.safetensors", "logs"} <= files
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "run_finished"
    environment = json.loads((folder / "environment.json").read_text())
    assert "experiments.train" in environment["command"] and environment["server"]["platform"]
    for log in (folder / "logs").iterdir():
        text = log.read_text()
        assert "Traceback" not in text, f"{log.name}: {text}"
        assert len(text.splitlines()) > 3 and "ends with code 0" in text, f"{log.name}: {text}"
    return rows, train.output


def test_devices_train_on_data_of_their_own(tmp_path: pathlib.Path) -> None:
    draw = np.random.default_rng(0)
    for index in range(2):
        # Device 0 lacks the highest class, and none of the two sees the other's file.
        labels = draw.integers(0, 2 + index, 40 + index)
        images = draw.normal(labels[:, None, None, None], 0.1, (len(labels), 6, 6, 1))
        np.savez(tmp_path / f"{index}.npz", x_train=images, y_train=labels)
    labels = np.arange(3)
    images = np.broadcast_to(labels[:, None, None, None].astype(np.float32), (3, 6, 6, 1))
    np.savez(tmp_path / "test.npz", x_test=images, y_test=labels)
    own = [
        f"--config.data.source=npz:{tmp_path}/{{device}}.npz",
        f"--config.data.test_source=npz:{tmp_path}/test.npz",
        "--config.data.classes=3",
        "--config.data.train_samples=0",
        "--config.data.test_samples=0",
        "--config.devices.1.link=lan/2ms",
    ]
    rows, _ = assert_ends_well("sl", tmp_path, *own)
    joined = {row["device"]: row["samples"] for row in rows if row["event"] == "device_joined"}
    assert sorted(joined.values()) == [40, 41]


@pytest.mark.skipif(not PREPARED.is_dir(), reason="no prepared CIFAR-10 in ../shared/data/tfds")
@pytest.mark.soak
@pytest.mark.parametrize("method", server_methods())
def test_real_cifar10_is_learned(tmp_path: pathlib.Path, method: str) -> None:
    arguments = ["--config=cifar10_vgg5", f"--config.data.data_dir={PREPARED}"]
    arguments += ["--config.data.train_samples=8000", "--config.data.test_samples=2000"]
    arguments += ["--config.epochs=3", f"--config.method={method}", f"--config.run.dir={tmp_path}"]
    with started("train", *arguments) as train:
        assert train.wait(600) == 0, train.output
    text = (tmp_path / "cifar10_vgg5" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "round_finished"]
    accuracies = [row["metrics"]["accuracy"] for row in rows if row["event"] == "evaluated"]
    assert losses[-1] < losses[0]
    assert accuracies[-1] > max(0.3, accuracies[0])


# The terminal's Ctrl-C, below, comes while it trains.
@pytest.mark.parametrize("when", ["starting", *soaked("training")])
def test_ctrl_c_ends_all_processes_at_once(
    tmp_path: pathlib.Path, when: str, within: Within
) -> None:
    with started("train", *long(tmp_path)) as train:
        if when == "training":
            train.wait_for("round 2 of")
        while len(train.children()) < 3:
            time.sleep(0.02)
        hosts = train.children()
        with within(3.0):
            train.process.send_signal(signal.SIGINT)
            assert train.wait() == 130
            assert all_gone(hosts)
        assert train.lines[-1] == "interrupted"
        assert "Traceback" not in train.output


@pytest.mark.soak
def test_ctrl_c_on_a_terminal_ends_the_live_view_too(tmp_path: pathlib.Path, quiet: bool) -> None:
    # A session of its own, whose terminal the pty becomes: ^C is a signal there. The child takes
    # the terminal itself, since code between fork and exec is not safe once jax has threads.
    take = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", take, "-m", "experiments.train", *long(tmp_path)]
    main, secondary = pty.openpty()
    process = subprocess.Popen(
        command, stdin=secondary, stdout=secondary, stderr=secondary, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    os.close(secondary)
    shown, asked_s = b"", None
    try:
        while select.select([main], [], [], 90)[0]:
            try:
                some = os.read(main, 1 << 16)
            except OSError:  # Linux's way to say that the other end is closed
                break
            shown += some
            if not some:
                break
            if asked_s is None and b"round 2" in shown:
                hosts = psutil.Process(process.pid).children(recursive=True)
                os.write(main, b"\x03")
                asked_s = time.monotonic()
        assert process.wait(PATIENCE_S) == 130
        assert len(hosts) == 3 and all_gone(hosts)
        assert asked_s is not None
        assert not quiet or time.monotonic() - asked_s < 3
        text = shown.decode(errors="replace")
        assert text.rstrip().endswith("interrupted")
        assert "\x1b[?25h" in text  # the cursor is back
        assert "Traceback" not in text
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pids are matched by /proc")
@pytest.mark.parametrize(
    ("victim", "name", "arguments"),
    [
        (0, "server", ()),
        pytest.param(1, "n1", CHAIN, marks=pytest.mark.soak),
        pytest.param(2, "d1", (), marks=pytest.mark.soak),
    ],
)
def test_a_killed_host_ends_the_run_with_one_clear_line(
    tmp_path: pathlib.Path, victim: int, name: str, arguments: tuple[str, ...], within: Within
) -> None:
    with started("train", *long(tmp_path, *arguments)) as train:
        train.wait_for("round 2 of")
        hosts = train.children()
        with within(BOUND_S):
            hosts[victim].kill()
            assert train.wait() == 1
        with within(1.0):
            assert all_gone(hosts)
        errors = [line for line in train.lines if line.startswith("error:")]
        assert len(errors) == 1 and train.lines[-1] == errors[0]
        assert f"the process of {name} was ended by SIGKILL" in errors[0]
        assert f"logs/{name}.log" in errors[0]
        assert "Traceback" not in train.output


# With fake hosts, `tests/pipar_jax/launch` tries all signals.
@pytest.mark.parametrize("number", soaked(signal.SIGKILL, signal.SIGTERM))
def test_no_host_outlives_a_killed_launcher(
    tmp_path: pathlib.Path, number: int, within: Within
) -> None:
    with started("train", *long(tmp_path)) as train:
        train.wait_for("round 2 of")
        hosts = train.children()
        assert len(hosts) == 3
        with within(BOUND_S):
            train.process.send_signal(number)
            assert train.wait() != 0
        with within(3.0):
            assert all_gone(hosts)


@pytest.mark.soak
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_on_a_full_disk_the_weights_are_saved_and_one_clear_line_ends_it(
    tmp_path: pathlib.Path, within: Within
) -> None:
    with started("train", *long(tmp_path), "--config.epochs=20") as train:
        train.wait_for("round 2 of")
        hosts = train.children()
        metrics = tmp_path / "digits" / "metrics.jsonl"
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").rename(metrics)
        assert train.wait() == 1
        with within(1.0):
            assert all_gone(hosts)
        assert "error: server: the run is over and" in train.lines[-1]
        assert "weights.safetensors is saved, but" in train.lines[-1]
        assert "rows of metrics.jsonl could not be kept: no space left" in train.lines[-1]
        assert "--config.run.dir" in train.lines[-1]
        assert train.output.count("some of its output is not saved: no space left on the") == 1
        assert load_file(tmp_path / "digits" / "weights.safetensors")
        assert "Traceback" not in train.output


@pytest.mark.parametrize("module", ["train", "server"])
def test_a_folder_that_cannot_be_written_is_one_clear_line(
    tmp_path: pathlib.Path, module: str
) -> None:
    (tmp_path / "file").write_text("")
    with started(module, *short(tmp_path / "file" / "below")) as train:
        assert train.wait() == 2
        assert len(train.lines) == 1  # before the data are read
        assert train.lines[0].startswith(f"error: run.dir='{tmp_path}/file/below' cannot be used")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.epoch=2"], "did you mean '--config.epochs'?"),
        (["--config.model.name=vgg55"], "did you mean 'vgg5'?"),
        (["--config.pipeline.cut=99"], "pipeline.cut"),
        (
            ["--config.data.source=svhn_cropped", "--config.data.data_dir=/no",
             "--config.data.download=false"],
            "download train_32x32.mat, test_32x32.mat from",
        ),
    ],
)  # fmt: skip
def test_bad_configuration_is_one_clear_line(
    tmp_path: pathlib.Path, arguments: list[str], says: str
) -> None:
    with started("train", *short(tmp_path, *arguments)) as train:
        assert train.wait() in (1, 2)
        errors = [line for line in train.lines if line.startswith("error:")]
        assert len(errors) == 1 and says in errors[0], train.output
        assert "Traceback" not in train.output


@pytest.mark.soak
def test_a_function_of_ones_own_that_fails_is_told_with_its_line_and_the_log(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'def load(device):\n    raise FileNotFoundError("put the CSV into data/raw")\n'
    (tmp_path / "my_csv.py").write_text(text)
    arguments = short(
        tmp_path,
        "--config.data.source=module:my_csv:load",
        "--config.data.train_samples=0",
        "--config.data.test_samples=0",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started("train", *arguments) as train:
        assert train.wait() == 1
        line = train.lines[-1]
        assert "FileNotFoundError: put the CSV into data/raw" in line
        assert f"({tmp_path}/my_csv.py:2, in load)" in line and "Traceback" not in train.output
        log = pathlib.Path(line.rpartition("(traceback in ")[2].rstrip(")"))
        assert "Traceback" in log.read_text() and "put the CSV into data/raw" in log.read_text()


def test_debug_shows_the_traceback(tmp_path: pathlib.Path) -> None:
    with started("train", *short(tmp_path, "--config.model.name=vgg55", "--debug")) as train:
        assert train.wait() == 2
        assert "Traceback" in train.output and train.lines[-1].startswith("error: model.name")


@pytest.mark.parametrize("module", ["train", "server", "device"])
def test_help_is_printed_and_ends_well(module: str) -> None:
    with started(module, "--help") as binary:
        assert binary.wait() == 0
        assert f"usage: pipar {module} --config=PRESET" in binary.output
        assert "--config.devices.defaults.link=none" in binary.output
