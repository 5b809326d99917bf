"""Hosts without an engine, for tests of the launcher: real processes that join over TCP and act.

Run as ``python -m tests.pipar_jax.fake_hosts``, with the arguments of
``pipar_jax.launch.process``. What each host does is in the environment variable FAKE_HOSTS, as
JSON: {"d1": "killed"}.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError, PeerError

FOREVER_S = 3600.0


def act(name: str) -> None:
    """Does what the test wants this host to do; returns if that is nothing special."""
    acts: dict[str, Callable[[], Any]] = {
        "": lambda: None,
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        # One of the signals for real time, which have no names.
        "killed by a number": lambda: os.kill(os.getpid(), 63),
        "config error": lambda: _raise(ConfigError("pipeline.cut=7 is beyond the last unit")),
        "fault": lambda: _raise(ValueError("two\nlines")),
        "full disk": lambda: _raise(OSError(errno.ENOSPC, "No space left", "metrics.jsonl")),
        "dies talking": lambda: (print("last words"), os._exit(7)),
        "returns": lambda: sys.exit(0),
        "hangs": lambda: time.sleep(FOREVER_S),
        "hangs deaf": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()),
                               time.sleep(FOREVER_S)),
    }  # fmt: skip
    acts[json.loads(os.environ.get("FAKE_HOSTS", "{}")).get(name, "")]()


def _hash(token: str | None) -> str | None:
    """Return what tells a token without showing it: events go into logs."""
    return None if token is None else hashlib.sha256(token.encode()).hexdigest()


def _raise(error: Exception) -> None:
    raise error


def _note_pid(config: Config, name: str) -> None:
    # Renamed, so that whoever sees the file sees the number in it.
    note = pathlib.Path(config.run.dir) / f"{name}.note"
    note.write_text(str(os.getpid()))
    note.rename(note.with_suffix(".pid"))


def run_server(
    config: Config, *, on_event: Callable[[dict[str, Any]], None], finish: threading.Event
) -> dict[str, Any]:
    _note_pid(config, "server")
    act("server before listening")
    names = [f"d{i}" for i in range(config.devices.count)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        on_event({"event": "listening", "host": host, "port": port})
        links = [listener.accept()[0] for _ in names]
        on_event({"event": "run_started", "cpus": sorted(os.sched_getaffinity(0)),
                  "platforms": os.environ.get("JAX_PLATFORMS"),
                  "token_hash": _hash(config.network.token)})  # fmt: skip
        act("server")
        for link in links:
            with link:
                hello = link.recv(100).decode()
                if not hello.endswith("done"):
                    raise PeerError(f"lost the link to {hello or 'a device'}")
    finished = {"event": "run_finished", "metrics": {"accuracy": 0.5}}
    on_event(finished)
    act("server at the end")
    return finished


def run_device(config: Config, index: int, address: tuple[str, int]) -> None:
    _note_pid(config, f"d{index}")
    with socket.create_connection(address) as link:
        act(f"d{index}")
        link.sendall(f"d{index} done".encode())
    act(f"d{index} at the end")


if __name__ == "__main__":
    for module, function in (("server", run_server), ("participants", run_device)):
        fake = types.ModuleType(f"pipar_jax.roles.{module}")
        setattr(fake, function.__name__, function)
        sys.modules[f"pipar_jax.roles.{module}"] = fake
    from pipar_jax.launch import process

    process.main()
