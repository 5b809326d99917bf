"""Runs an experiment on this machine: one process per host, none of which outlives the launcher.

Each child is a ``pipar_jax.launch.process`` with three connections: its standard input, which
carries the server's address and whose end means that the parent has ended; a pipe on which it
reports events; and a log file in the run's folder, which receives everything that it prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time

import pipar_jax
from pipar_jax import data, errors
from pipar_jax.config import Config
from pipar_jax.config.cohorts import planned
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.files import describe_os_error
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import PiparError, RunError
from pipar_jax.launch import machine
from pipar_jax.launch.process import FINISH, PATH_VARIABLE, TOKEN_VARIABLE, finishing
from pipar_jax.launch.run_folders import HeldFolder, check_place, hold_folder
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import COORDINATOR, device_name, is_device

#: Seconds for which the other processes may report errors after the first failure.
GRACE_S = 2.0
_POLL_S = 0.1
_NOTE_CHARACTERS = 20_000
_FOLLOW_UPS = ("PeerError", "JoinError", "PeerLost")


def launch(
    config: Config,
    *,
    on_event: OnEvent | None = None,
    process_module: str = "pipar_jax.launch.process",
) -> JsonObject:
    """Trains on this machine, in a process per host, and returns when all have ended.

    Args:
      config: The configuration; ``devices.count`` devices are started.
      on_event: Called with each of the server's events, in this thread.
      process_module: The module that is run as a host.

    Returns:
      The server's ``run_finished`` event, with the run's folder.

    Raises:
      PiparError: The first error of a host that is not a consequence of another host's. The end of
        a host that the run may lose (``cohort.*``, ``nodes.replicate_every``) is not an error while
        a device is running.
      KeyboardInterrupt: Ctrl-C; all processes have been ended.
    """
    config = resolve(config)
    machine.check(config)
    check_place(config)
    planned(config.cohort, config.devices.total)
    data.prepare(config)
    with (
        hold_folder(config) as folder,
        finishing(config.checkpoint) as finish,
        _Hosts(config, folder, on_event or (lambda event: None), process_module) as hosts,
    ):
        return hosts.follow(finish)


class _Child:
    """The process of a host and its events so far."""

    def __init__(
        self,
        name: str,
        command: list[str],
        folder: pathlib.Path,
        token: str | None,
        inherited: tuple[int, ...],
    ) -> None:
        self.name = name
        self.log = folder / "logs" / f"{name}.log"
        self.failure: JsonObject | None = None
        self.ended_s: float | None = None
        self.open = True
        self._text = b""
        self.events, events = os.pipe()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        # A child finds the packages where its parent does, installed or not.
        home = str(pathlib.Path(pipar_jax.__file__).resolve().parents[1])
        paths = [home, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # Modules of the user's are looked for where its parent looks, after its own folders.
        environment[PATH_VARIABLE] = os.pathsep.join(sys.path)
        if token is not None:
            environment[TOKEN_VARIABLE] = token
        try:
            with open(self.log, "wb") as output:
                self.process = subprocess.Popen(
                    [*command, f"--events={events}", f"--log={self.log}"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(events, *inherited),
                    env=environment,
                    # Ctrl-C reaches only the parent, which ends all children.
                    start_new_session=True,
                )
        except OSError as error:
            os.close(self.events)
            text = describe_os_error(error)
            raise RunError(f"the process of {name} cannot be started: {text}") from error
        finally:
            os.close(events)

    def send(self, line: str) -> None:
        """Writes a line to the child, which may have ended."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it has ended, its exit code tells why
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def read(self) -> list[JsonObject]:
        """Returns the events since the last call and records the end of the pipe."""
        some = os.read(self.events, 1 << 16)
        if not some:
            self.open = False
        *lines, self._text = (self._text + some).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Ends the process, if it runs, and closes its pipes."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it holds data that is not read any more
            self.process.stdin.close()
        os.close(self.events)

    def note_end(self) -> None:
        """Records when the process ended, once all of its events are read."""
        if self.ended_s is None and not self.open and self.process.poll() is not None:
            self.ended_s = time.monotonic()

    @property
    def lost_a_peer(self) -> bool:
        """Whether it reported the end of the run or of a peer, and no error of its own."""
        return self.failure is not None and self.failure.get("kind") in _FOLLOW_UPS

    @property
    def has_failed(self) -> bool:
        """Whether the process reported an error or ended abnormally."""
        return self.failure is not None or (
            self.ended_s is not None and self.process.returncode != 0
        )

    def error(self) -> PiparError:
        """Returns the error of the child, with its output as a note."""
        printed = ""
        with contextlib.suppress(OSError):  # the folder may be gone, and the error is still known
            printed = self.log.read_text(encoding="utf-8", errors="replace").strip()
        error = self._error(printed.rpartition("\n")[2][:300])
        if printed:
            error.add_note(f"{self.log}:\n{printed[-_NOTE_CHARACTERS:]}")
        return error

    def _error(self, last_line: str) -> PiparError:
        if self.failure is not None:
            kind = getattr(errors, str(self.failure.get("kind", "")), RunError)
            made: PiparError = kind(f"{self.name}: {self.failure['error']}")
            return made
        code = self.process.returncode
        rest = f"; its last line: {last_line}" if last_line else ""
        if code is not None and code < 0:
            name = _name_of(-code)
            hint = " (killed by a user, or the machine ran out of memory)" if code == -9 else ""
            return RunError(
                f"the process of {self.name} was ended by {name}{hint}; log: {self.log}{rest}"
            )
        return RunError(
            f"the process of {self.name} ended with code {code} without reporting an error; log: "
            f"{self.log}{rest}"
        )


class _Hosts:
    """All processes of a run, from the start of the first to the end of the last."""

    def __init__(self, config: Config, folder: HeldFolder, on_event: OnEvent, module: str):
        self._config = config
        self._specs = hosts_of(config)
        self._folder, self._lock = folder
        self._on_event = on_event
        self._module = module
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._listening = False
        self._summary: JsonObject | None = None

    def __enter__(self) -> _Hosts:
        try:
            self._start(COORDINATOR)
            # What a run begins from is for the server to read: if it cannot, nobody else starts.
            if not (self._config.run.resume or self._config.model.weights):
                self._start_others()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def follow(self, finish: threading.Event) -> JsonObject:
        """Forwards events until all processes have ended; returns the run's last event.

        Raises:
          PiparError: A host failed.
        """
        server = self._children[0]
        started_s = time.monotonic()
        patience_s: float | None = None
        told = False
        while any(child.ended_s is None for child in self._children):
            if finish.is_set() and not told:
                told = True
                server.send(FINISH)
            for key, _ in self._selector.select(_POLL_S):
                self._take(key.data)
            for child in self._children:
                child.note_end()
            now_s = time.monotonic()
            failed = bool(self._failed())
            if patience_s is None and (failed or server.ended_s is not None):
                patience_s = now_s + (GRACE_S if failed else self._config.network.deadline_s)
            if patience_s is not None and now_s > patience_s:
                break
            limit_s = self._config.network.join_timeout_s
            if not (self._listening or failed) and now_s - started_s > limit_s:
                raise RunError(
                    f"the server did not listen within network.join_timeout_s={limit_s:g} s; log: "
                    f"{server.log}"
                )
        self._raise_first()
        if self._summary is None:
            raise RunError(f"the server ended without finishing the run; log: {server.log}")
        return {**self._summary, "folder": str(self._folder)}

    def _start(self, name: str) -> None:
        # -P: a package in the working directory must not shadow one of ours.
        command = [sys.executable, "-P", "-m", self._module, f"--name={name}"]
        command.append(f"--config={self._folder / 'config.json'}")
        # The server writes to the folder, and may outlive a launcher that is killed for a moment.
        lock = (self._lock,) if name == COORDINATOR else ()
        child = _Child(name, command, self._folder, self._config.network.token, lock)
        self._children.append(child)
        self._selector.register(child.events, selectors.EVENT_READ, child)

    def _start_others(self) -> None:
        """Starts compute nodes and devices."""
        for name in self._specs.nodes:
            self._start(name)
        for index in range(self._config.devices.count):
            self._start(device_name(index))

    def _take(self, child: _Child) -> None:
        for event in child.read():
            kind = event.get("event")
            if kind == "process_failed":
                child.failure = event
            elif kind == "listening":
                self._listening = True
                if len(self._children) == 1:
                    self._start_others()
                for other in self._children[1:]:
                    other.send(f"{event['host']}:{event['port']}")
                self._on_event(event)
            else:
                if kind == "run_finished":
                    self._summary = event
                self._on_event(event)
        if not child.open:
            self._selector.unregister(child.events)

    def _failed(self) -> list[_Child]:
        """Returns the children whose failure ends the run.

        A run that may lose hosts (``cohort.*``, ``nodes.replicate_every``) continues as long as the
        server does, which decides what a loss means. If no device is left, and none was still
        running when the server ended, the devices are the reason.
        """
        failed = [child for child in self._children if child.has_failed]
        devices = [child for child in self._children if is_device(child.name)]
        none_left = all(device in failed and not device.lost_a_peer for device in devices)
        return [
            child for child in failed
            if not self._specs.may_be_lost(child.name) or (none_left and child in devices)
        ]  # fmt: skip

    def _raise_first(self) -> None:
        failed = self._failed()
        if failed:
            # A process that died without a message comes before one that reported an error, and
            # both before those that only lost a peer; among equals the first.
            raise min(failed, key=_rank).error()
        # A host that the run has lost may still be trying to come back.
        may_stay = self._specs.may_be_lost
        late = [
            child for child in self._children if child.ended_s is None and not may_stay(child.name)
        ]
        if late:
            raise RunError(
                f"{', '.join(child.name for child in late)} did not end within "
                f"network.deadline_s={self._config.network.deadline_s:g} s after the server did; "
                f"log: {late[0].log}"
            )

    def _end(self) -> None:
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.close()
        self._selector.close()


def _name_of(number: int) -> str:
    """Returns the name of a signal; those of real time have numbers alone."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _rank(child: _Child) -> tuple[int, float]:
    order = 0
    if child.failure is not None:
        order = 2 if child.lost_a_peer else 1
        # Of a run that the server has ended it says why; what others say of it comes after.
        order += child.failure.get("kind") == "PeerError" and child.name != COORDINATOR
    return order, child.ended_s if child.ended_s is not None else float("inf")
