"""Starts the binaries as a user does, and looks after what they leave."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.patience import PATIENCE_S, PROCESS_S

ROOT = pathlib.Path(__file__).parents[2]

#: A run that is small, and long enough to be disturbed.
LONG = ("--config.model.name=mlp", "--config.epochs=2000", "--config.run.trace=none")


def soaked(*values: object) -> list[Any]:
    """Returns parameters of a test that `make soak` alone runs: each run starts processes."""
    return [pytest.param(value, marks=pytest.mark.soak) for value in values]


class Binary:
    """A started binary whose output is read as it comes."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, within_s: float = PROCESS_S) -> str:
        """Returns the first line with a text."""
        patience_s = time.monotonic() + within_s
        while True:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(PATIENCE_S)
            for line in list(self.lines):
                if text in line:
                    return line
            assert not ended, f"it ended without {text!r}:\n{self.output}"
            assert time.monotonic() < patience_s, f"no {text!r} within {within_s} s:\n{self.output}"
            time.sleep(0.02)

    def wait(self, within_s: float = PROCESS_S) -> int:
        """Returns the exit code."""
        code = self.process.wait(within_s)
        self._reader.join(PATIENCE_S)
        return code

    def children(self) -> list[psutil.Process]:
        """Returns the processes of the hosts, the server's first."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(found, key=lambda one: one.pid)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def started(module: str, *arguments: str) -> Iterator[Binary]:
    """Starts a binary and ends it, if it still runs, after the block."""
    binary = Binary(module, *arguments)
    try:
        yield binary
    finally:
        binary.close()


def all_gone(processes: list[psutil.Process], within_s: float = PATIENCE_S) -> bool:
    """Returns whether processes end in time; dead ones that nobody waited for count as gone."""
    patience_s = time.monotonic() + within_s
    while any(_lives(one) for one in processes):
        if time.monotonic() > patience_s:
            return False
        time.sleep(0.02)
    return True


def _lives(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
