"""Files that are whole or not there: everything that a run or a binary leaves goes through here.

A file is written aside, in the folder where it will be, brought to the disk, and then renamed to
its name: whoever looks sees what was there before or all of what is new, whatever ends this process
or the machine. What the system refuses (a full disk, a quota, a folder that cannot be written) is
one ``DiskError`` that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comms.errors import explain
from pipar_jax.errors import DiskError

#: What to do where a run's own files cannot be written.
RUN_REMEDY = "choose another folder with --config.run.dir"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: How the Rust parts of safetensors tell the number of an error of the system.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def replacing(path: str | Path, remedy: str = RUN_REMEDY) -> Iterator[Path]:
    """Yields a name to write a file under; on a good end the file is at ``path``, whole.

    Where ``path`` is no regular file, such as /dev/stdout, it is written as it is. A link stays:
    what it leads to is replaced.

    Args:
      path: Where the file goes.
      remedy: What the user can do if it cannot be written, for the message.

    Raises:
      DiskError: It cannot be written; nothing is left of it, and what was at ``path`` still is.
    """
    with refused(path, remedy):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            yield target
            return
        aside = target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix}")
        try:
            yield aside
            _bring_to_disk(aside, os.O_RDWR)
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):  # it may not be there; the first error is told
                aside.unlink()
            raise
        _bring_to_disk(target.parent, os.O_RDONLY)


def write_bytes(path: str | Path, content: bytes, remedy: str = RUN_REMEDY) -> None:
    """Writes a file at once or not at all, see ``replacing``.

    Raises:
      DiskError: It cannot be written.
    """
    with replacing(path, remedy) as aside:
        aside.write_bytes(content)


def write_text(path: str | Path, text: str, remedy: str = RUN_REMEDY) -> None:
    """Writes a text as UTF-8 at once or not at all, see ``replacing``.

    Raises:
      DiskError: It cannot be written.
    """
    write_bytes(path, text.encode(), remedy)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    remedy: str = RUN_REMEDY,
) -> None:
    """Writes arrays as a safetensors file at once or not at all, see ``replacing``.

    Args:
      path: Where the file goes.
      tensors: Arrays of numpy, in C order, by name.
      metadata: Texts kept in the file's header.
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
            found = _RUST_ERRNO.search(str(error))
            if found is None:  # not the disk: tensors that it cannot write
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def make_folder(path: str | Path, remedy: str = RUN_REMEDY) -> Path:
    """Makes a folder and those above it, where they are not there yet, and returns it.

    Raises:
      DiskError: It cannot be made.
    """
    with refused(path, remedy):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def refused(path: str | Path, remedy: str = RUN_REMEDY) -> Iterator[None]:
    """Turns what the system refuses while a file is written into an error that names the file.

    Raises:
      DiskError: The system refused.
    """
    try:
        yield
    except OSError as error:
        told = OSError(error.errno, explain(error), str(path))
        raise DiskError(describe_os_error(told, remedy)) from error


def describe_os_error(error: OSError, remedy: str = RUN_REMEDY) -> str:
    """Returns one line about a failed call of the system: what, which file, what to do."""
    name = f": {error.filename}" if error.filename else ""
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return f"no space left on the disk{where}: free some, or {remedy}"
    if error.errno == errno.EFBIG:
        return f"a file larger than this process may write{where}: raise ulimit -f, or {remedy}"
    if error.errno in _FORBIDDEN:
        return (
            f"{explain(error)}: {error.filename or 'a file'}: give this user the right to write "
            f"there, or {remedy}"
        )
    return f"{explain(error)}{name}"


def describe_reading(error: Exception) -> str:
    """Returns one line about why a file could not be read: the system's word, or what is in it."""
    if isinstance(error, OSError):
        return explain(error) + (f": {error.filename}" if error.filename else "")
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split()) or type(error).__name__


def _bring_to_disk(path: Path, flags: int) -> None:
    """Waits until a file or a folder is on the disk, where its file system can say so."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
