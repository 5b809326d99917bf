"""The roles started by hand, each in its terminal: they meet, disagree, and lose one another."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest

from tests.conftest import Within
from tests.experiments.running import LONG, Binary, started

BOUND_S = 10.0
SMALL = ("--config=digits", "--config.model.name=mlp", "--config.data.train_samples=64",
         "--config.epochs=1")  # fmt: skip


def address_of(server: Binary) -> str:
    return server.wait_for("listening on").rpartition(" ")[2]


def test_server_and_devices_train_together(tmp_path: pathlib.Path) -> None:
    with started("server", *SMALL, f"--config.run.dir={tmp_path}") as server:
        where = f"--server={address_of(server)}"
        with (
            started("device", *SMALL, where, "--index=0") as one,
            started("device", *SMALL, where, "--index=1") as other,
        ):
            assert one.wait() == 0 and other.wait() == 0, one.output + other.output
            assert server.wait() == 0, server.output
            assert one.lines[-1] == "done"
    assert "test accuracy" in server.lines[-1]
    assert (tmp_path / "digits" / "weights.safetensors").exists()


@pytest.mark.soak
def test_a_device_may_start_before_the_server(tmp_path: pathlib.Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    devices = ["--config.devices.count=1", f"--server=127.0.0.1:{port}", "--index=0"]
    with started("device", *SMALL, *devices) as device:
        device.wait_for("joins")
        time.sleep(0.5)
        arguments = ["--config.devices.count=1", f"--config.server.port={port}"]
        with started("server", *SMALL, *arguments, f"--config.run.dir={tmp_path}") as server:
            assert server.wait() == 0, server.output
            assert device.wait() == 0, device.output


def test_an_unreachable_server_is_one_clear_line(within: Within) -> None:
    flags = ["--server=127.0.0.1:1", "--index=0", "--config.network.join_timeout_s=1"]
    with started("device", *SMALL, *flags) as device:
        device.wait_for("joins")
        with within(BOUND_S):
            assert device.wait() == 1
        assert device.lines[-1].startswith("error: ") and "127.0.0.1 port 1" in device.lines[-1]
        assert "Traceback" not in device.output


def test_a_device_that_differs_is_refused_and_told_in_what(tmp_path: pathlib.Path) -> None:
    one = [*SMALL, "--config.devices.count=1"]
    with started("server", *one, f"--config.run.dir={tmp_path}") as server:
        where = f"--server={address_of(server)}"
        with (
            started("device", *one, "--config.model.name=cnn", where, "--index=0") as model,
            started(
                "device", *one, "--config.optimizer.learning_rate=1", where, "--index=0"
            ) as rate,
        ):
            for device, field in ((model, "model.name"), (rate, "learning")):
                assert device.wait() == 1
                assert device.lines[-1].startswith("error: ") and field in device.lines[-1]
        # It still waits for a device that fits.
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130
        assert "Traceback" not in server.output + model.output + rate.output


def test_a_server_that_nobody_joins_says_so_in_one_line(tmp_path: pathlib.Path) -> None:
    brief = "--config.network.join_timeout_s=0.2"
    with started("server", *SMALL, brief, f"--config.run.dir={tmp_path}") as server:
        assert server.wait() == 1
        assert server.lines[-1].startswith("error: d0, d1 of 2 hosts did not join within 0.2 s")
        assert "Traceback" not in server.output


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("server", signal.SIGKILL),
        ("device", signal.SIGINT),
        pytest.param("server", signal.SIGINT, marks=pytest.mark.soak),
        pytest.param("device", signal.SIGKILL, marks=pytest.mark.soak),
    ],
)
def test_who_loses_its_peer_says_so_in_time(
    tmp_path: pathlib.Path, number: signal.Signals, victim: str, within: Within
) -> None:
    one = ["--config=digits", *LONG, "--config.devices.count=1"]
    with started("server", *one, f"--config.run.dir={tmp_path}") as server:
        where = f"--server={address_of(server)}"
        with started("device", *one, where, "--index=0") as device:
            server.wait_for("round 2 of")
            gone, left = (server, device) if victim == "server" else (device, server)
            with within(BOUND_S):
                gone.process.send_signal(number)
                assert left.wait() == 1
            assert gone.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
            assert left.lines[-1].startswith("error: "), left.output
            assert "Traceback" not in left.output + gone.output


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--index=0"], "--server='' is not valid: write --server=HOST:PORT"),
        (["--index=0", "--server=here"], "--server='here' is not valid"),
        (["--server=127.0.0.1:7000"], "--index=-1 is not valid"),
        (["--server=127.0.0.1:7000", "--index=2"], "index must be 0 to 1"),
    ],
)
def test_wrong_flags_of_a_device_are_one_clear_line(flags: list[str], says: str) -> None:
    with started("device", *SMALL, *flags) as device:
        assert device.wait() == 2
        assert len(device.lines) == 1 and says in device.lines[0]
