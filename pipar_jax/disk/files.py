"""Atomic files: all files of runs and binaries are written by this module.

A file is written under a temporary name in its folder, synced to disk, and renamed: readers see
either the old or the complete new contents, even if the process or the machine fails. Errors of the
system (a full disk, a quota, a missing permission) become a ``DiskError`` that names the file and a
remedy. What a binary is to write is looked at before its work (``check_target``); a file that is
there is replaced only if the user has named it (``unused``).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comms.errors import explain
from pipar_jax.errors import ConfigError, DiskError

#: Remedy if files of a run cannot be written.
RUN_REMEDY = "choose another folder with --config.run.dir"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: The errno in error messages of safetensors' Rust code.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def replacing(path: str | Path, remedy: str = RUN_REMEDY) -> Iterator[Path]:
    """Yields a temporary name for a file, which is renamed to ``path`` if the block succeeds.

    If ``path`` is not a regular file, such as /dev/stdout, it is written directly. The target of a
    symbolic link is replaced, not the link.

    Args:
      path: Path of the file.
      remedy: Remedy in the message if the file cannot be written.

    Raises:
      DiskError: The file cannot be written; ``path`` is unchanged and no temporary file remains.
    """
    with refused(path, remedy):
        if os.path.exists(path) and not os.path.isfile(path):
            yield Path(path)  # as named: a pipe behind /dev/stdout has no other name
            return
        target = Path(os.path.realpath(path))
        aside = target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix}")
        try:
            yield aside
            _bring_to_disk(aside, os.O_RDWR)
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):  # it may not exist; the first error is reported
                aside.unlink()
            raise
        _bring_to_disk(target.parent, os.O_RDONLY)


def write_bytes(path: str | Path, content: bytes, remedy: str = RUN_REMEDY) -> None:
    """Writes a file atomically, see ``replacing``.

    Raises:
      DiskError: The file cannot be written.
    """
    with replacing(path, remedy) as aside:
        aside.write_bytes(content)


def write_secret(path: str | Path, content: bytes, remedy: str = RUN_REMEDY) -> None:
    """Writes a file that only this user may read, atomically, see ``replacing``.

    Raises:
      DiskError: The file cannot be written.
    """
    # Private from the start, so that others cannot read the secret even briefly.
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with (
        replacing(path, remedy) as aside,
        os.fdopen(os.open(aside, exclusive, 0o600), "wb") as file,
    ):
        file.write(content)


def write_text(path: str | Path, text: str, remedy: str = RUN_REMEDY) -> None:
    """Writes a text as UTF-8 atomically, see ``replacing``.

    Raises:
      DiskError: The file cannot be written.
    """
    write_bytes(path, text.encode(), remedy)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    remedy: str = RUN_REMEDY,
) -> None:
    """Writes arrays as a safetensors file atomically, see ``replacing``.

    Args:
      path: Path of the file.
      tensors: Arrays of numpy by name, in C order.
      metadata: Texts for the file's header.
      remedy: What the user can do if it cannot be written.

    Raises:
      DiskError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path, remedy) as aside:
        try:
            save_file(dict(tensors), aside, dict(metadata))
        except SafetensorError as error:
            match = _RUST_ERRNO.search(str(error))
            if match is None:  # not an error of the disk, but tensors that cannot be written
                raise
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


def make_folder(path: str | Path, remedy: str = RUN_REMEDY) -> Path:
    """Creates a folder and its missing parents, and returns its path.

    Raises:
      DiskError: The folder cannot be created.
    """
    with refused(path, remedy):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def check_target(path: str | Path, said: str) -> None:
    """Checks that a file can be written, before the work whose result it is to hold.

    Args:
      path: Path of the file, which may exist.
      said: What the message calls it, such as ``--output=a.png``.

    Raises:
      ConfigError: It is a folder, its folder does not exist, or this user may not write it.
    """
    mode = _mode_of(path, said)
    if mode is not None and stat.S_ISDIR(mode):
        raise ConfigError(f"{said} is a folder: name a file")
    folder = os.path.dirname(os.path.realpath(path))
    # A file is written aside in its folder; what is none, such as /dev/stdout, is written itself.
    is_special = mode is not None and not stat.S_ISREG(mode)
    if not is_special and not os.path.isdir(folder):
        raise ConfigError(
            f"{said}: the folder {folder} does not exist; create it, or name another file"
        )
    _check_permission(path if is_special else folder, said, "file")


def check_folder(path: str | Path, said: str) -> None:
    """Checks that a folder can be written, or else made with its missing parents.

    Args:
      path: Path of the folder.
      said: What the message calls it, such as ``run.dir='runs'``.

    Raises:
      ConfigError: It is a file, or this user may not make it or write in it.
    """
    wanted = Path(path).absolute()
    there = next(one for one in (wanted, *wanted.parents) if is_folder(one, said))
    _check_permission(there, said, "folder")


def is_folder(path: str | Path, said: str) -> bool:
    """Returns whether a folder is there; False: nothing is.

    Args:
      path: Path of the folder.
      said: What the message calls it.

    Raises:
      ConfigError: A file is there, or this user may not look.
    """
    mode = _mode_of(path, said)
    if mode is not None and not stat.S_ISDIR(mode):
        raise ConfigError(f"{said} is a file: name a folder")
    return mode is not None


def numbered(name: str) -> Iterator[str]:
    """Yields a name, and then others in case it is taken: ``digits``, ``digits-2`` and so on."""
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def unused(folder: str | Path, name: str, suffix: str) -> Path:
    """Returns the first path of ``numbered`` names at which nothing is.

    Args:
      folder: The folder.
      name: Name of the file, without its suffix.
      suffix: Its suffix, such as ``.html``.
    """
    paths = (Path(folder) / f"{one}{suffix}" for one in numbered(name))
    return next(path for path in paths if not os.path.lexists(path))


@contextlib.contextmanager
def refused(path: str | Path, remedy: str = RUN_REMEDY) -> Iterator[None]:
    """Turns errors of the system while a file is written into an error that names the file.

    Raises:
      DiskError: The system reported an error.
    """
    try:
        yield
    except OSError as error:
        told = OSError(error.errno, explain(error), str(path))
        raise DiskError(describe_os_error(told, remedy)) from error


def describe_os_error(error: OSError, remedy: str = RUN_REMEDY) -> str:
    """Returns one line about a failed system call: the error, the file and a remedy."""
    name = f": {error.filename}" if error.filename else ""
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return f"no space left on the disk{where}: free some, or {remedy}"
    if error.errno == errno.EFBIG:
        return f"a file larger than this process may write{where}: raise ulimit -f, or {remedy}"
    if error.errno in _FORBIDDEN:
        return (
            f"{explain(error)}: {error.filename or 'a file'}: give this user write permission, or "
            f"{remedy}"
        )
    return f"{explain(error)}{name}"


def describe_reading(error: Exception) -> str:
    """Returns one line that explains why a file could not be read."""
    if isinstance(error, OSError):
        return explain(error) + (f": {error.filename}" if error.filename else "")
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split()) or type(error).__name__


def _mode_of(path: str | Path, said: str) -> int | None:
    """Returns the mode of what is at a path; None: nothing is there.

    Raises:
      ConfigError: The system does not say, since a name is too long or a folder may not be read.
    """
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{said} cannot be used: {explain(error)}; name another one") from error


def _check_permission(path: str | Path, said: str, kind: str) -> None:
    """Checks that this user may write to something that is there, or in it if it is a folder.

    Args:
      path: Its path.
      said: What the message calls the target.
      kind: What the target is.

    Raises:
      ConfigError: This user may not.
    """
    inside = os.path.isdir(path)
    if not os.access(path, os.W_OK | os.X_OK if inside else os.W_OK):
        raise ConfigError(
            f"{said}: this user may not write {'in ' if inside else ''}{path}; give it write "
            f"permission, or name another {kind}"
        )


def _bring_to_disk(path: Path, flags: int) -> None:
    """Syncs a file or folder to disk, if its file system supports it."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
