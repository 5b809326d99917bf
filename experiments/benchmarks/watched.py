"""Processes that a benchmark starts, watches, kills, stops, and looks after.

A watched process writes lines to its standard output; each is kept with its time. Linux only: other
processes of a run are found in /proc by the folder in their command line, as no process reports
its children once it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipar_jax.errors import RunError

#: Seconds in which a process must do what is waited for; a run that hangs is an error.
PATIENCE_S = 300.0


class Line(NamedTuple):
    """A line of a process.

    Attributes:
      time_s: When it was read, on the monotonic clock.
      text: The line.
    """

    time_s: float
    text: str

    @property
    def event(self) -> dict[str, Any]:
        """The event that the line tells as JSON; empty if it is none."""
        if not self.text.startswith("{"):
            return {}
        found: dict[str, Any] = json.loads(self.text)
        return found


class Watched:
    """A process whose output is read as it comes.

    Attributes:
      process: The process.
      lines: Its lines so far.

    Args:
      module: The module that it runs.
      *arguments: Its arguments.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[Line] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            with self._news:
                self.lines.append(Line(time.monotonic(), text.rstrip("\n")))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def events(self) -> list[Line]:
        """The lines that tell events."""
        return [line for line in list(self.lines) if line.event]

    def wait_for(self, wanted: Callable[[Line], bool], since: int = 0) -> Line | None:
        """Returns the first line from a number on that is wanted; None if the process ended before.

        Raises:
          RunError: Neither happened in time.
        """
        until_s = time.monotonic() + PATIENCE_S
        with self._news:
            while True:
                for line in self.lines[since:]:
                    if wanted(line):
                        return line
                since = len(self.lines)
                if not self._reader.is_alive():
                    return None
                if time.monotonic() > until_s:
                    raise RunError(f"a process tells nothing any more; {self.last_words}")
                self._news.wait(0.2)

    @property
    def last_words(self) -> str:
        """Its last lines, for an error."""
        return "its last lines: " + " | ".join(line.text[:300] for line in self.lines[-5:])

    def end(self) -> int:
        """Waits until it has ended by itself; returns its exit code.

        Raises:
          RunError: It did not end in time.
        """
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"a process does not end; {self.last_words}") from error
        self._reader.join()
        return code

    def close(self) -> None:
        """Kills it, if it runs still."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def watching(module: str, *arguments: str) -> Iterator[Watched]:
    """Starts a process, and kills it after the block if it runs still."""
    process = Watched(module, *arguments)
    try:
        yield process
    finally:
        process.close()


class Found(NamedTuple):
    """A process of this machine.

    Attributes:
      pid: Its number.
      command: Its command line.
    """

    pid: int
    command: tuple[str, ...]

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it is there still."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes_of(folder: pathlib.Path) -> list[Found]:
    """Returns the living processes whose command line names a file of a folder."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                words = (entry / "cmdline").read_bytes().split(b"\0")
                command = tuple(word.decode(errors="replace") for word in words)
                if any(str(folder) in word for word in command):
                    found.append(Found(int(entry.name), command))
    return found


def host_of(folder: pathlib.Path, name: str) -> Found | None:
    """Returns the process of a host of a run in a folder, if it lives."""
    wanted = f"--name={name}"
    return next((one for one in processes_of(folder) if wanted in one.command), None)


def left_behind(folder: pathlib.Path, within_s: float) -> list[Found]:
    """Returns the processes of a run that do not end in time, and kills them."""
    until_s = time.monotonic() + within_s
    while (left := processes_of(folder)) and time.monotonic() < until_s:
        time.sleep(0.05)
    for one in left:
        one.signal(signal.SIGKILL)
    return left


class Usage(NamedTuple):
    """What a process holds.

    Attributes:
      resident_bytes: Its resident memory.
      descriptors: Its open descriptors.
      threads: Its threads.
    """

    resident_bytes: int
    descriptors: int
    threads: int


def usage(pid: int) -> Usage:
    """Returns what a process holds."""
    base = pathlib.Path("/proc", str(pid))
    pages = int((base / "statm").read_text().split()[1])
    return Usage(
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(list((base / "fd").iterdir())),
        len(list((base / "task").iterdir())),
    )


def free_port() -> int:
    """Returns a port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Cutter:
    """Forwards connections to a server, and cuts one of them when told to.

    Attributes:
      cuts: Number of connections that were cut.
      address: Where it listens.

    Args:
      port: The server's port on the loopback interface.
    """

    def __init__(self, port: int) -> None:
        self._port, self.cuts = port, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self, which: int) -> bool:
        """Cuts a connection; returns whether there was any.

        Args:
          which: Any number; the connection of this number modulo theirs is cut.
        """
        with self._lock:
            if not self._pairs:
                return False
            pair = self._pairs.pop(which % len(self._pairs))
            self.cuts += 1
        _shut(*pair)
        return True

    def close(self) -> None:
        """Ends all connections and threads."""
        _shut(self._listener)
        while self.cut(0):
            pass
        for thread in list(self._threads):
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                _shut(near)
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            for pair in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._forward, args=pair))
                self._threads[-1].start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with self._lock:
            self._pairs = [pair for pair in self._pairs if source not in pair]
        _shut(source, target)


def _shut(*some: socket.socket) -> None:
    """Ends sockets that other threads may be waiting for."""
    for one in some:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def equal_files(paths: Sequence[pathlib.Path]) -> bool:
    """Returns whether files of weights hold the same arrays bit for bit."""
    from safetensors.numpy import load_file

    first, *others = [load_file(path) for path in paths]
    return all(
        first.keys() == other.keys()
        and all(array.tobytes() == other[name].tobytes() for name, array in first.items())
        for other in others
    )
