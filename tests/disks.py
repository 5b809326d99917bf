"""Disks that refuse: a full one, one that cannot be written or read, files that must not grow."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@contextlib.contextmanager
def full_disk(folder: Path, kilobytes: int = 16) -> Iterator[Path]:
    """Mounts a disk with almost no space; skips the test where that needs rights it lacks."""
    disk = folder / "disk"
    disk.mkdir()
    options = f"size={kilobytes}k"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk is tested where there is mount")
    if done.returncode:
        pytest.skip("a full disk is tested where this user may mount one (root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextlib.contextmanager
def read_only_disk(folder: Path) -> Iterator[Path]:
    """Mounts a disk that nobody can write, root neither; skips where that cannot be."""
    with full_disk(folder) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk


@contextlib.contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    """Lets no file of this process grow beyond a size, as ``ulimit -f`` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Lets this process not look into a folder, whoever runs it: root may look everywhere."""

    def refusing(look: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any, *arguments: Any, **values: Any) -> Any:
            if str(path).startswith(f"{folder}{os.sep}"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return look(path, *arguments, **values)

        return refuse

    with (
        mock.patch.object(os, "stat", refusing(os.stat)),
        mock.patch.object(os, "lstat", refusing(os.lstat)),
    ):
        yield


def leftovers(folder: Path) -> list[str]:
    """Returns the names in a folder."""
    return sorted(os.listdir(folder))
