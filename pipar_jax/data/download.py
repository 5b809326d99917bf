"""Downloads published files and verifies their checksums."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import pathlib
import tempfile
import urllib.error
import urllib.request
from typing import IO

from comms.errors import explain
from pipar_jax.data.published import File
from pipar_jax.errors import DataError

#: Timeout of a silent server.
TIMEOUT_S = 30.0
_AT_ONCE = 1 << 20


def fetch(file: File, folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of a published file in a folder, after downloading it if it is missing.

    It is written under a temporary name and renamed when it is complete and its checksum is
    correct.

    Args:
      file: The file.
      folder: Target folder; created if missing.

    Raises:
      DataError: The file cannot be downloaded or written, or its checksum is wrong.
    """
    target = folder / file.name
    if target.is_file():
        return target
    logging.getLogger(__name__).warning(
        "downloading %s (%.1f MB) into %s", file.url, file.nbytes / 1e6, folder
    )
    part = None
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as answer:
            # Only now, so that a failed download leaves no folder behind.
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{file.name}-", suffix=".part", dir=folder)
            part = pathlib.Path(name)
            with os.fdopen(handle, "wb") as output:
                _copy(file, answer, output)
                output.flush()
                os.fsync(output.fileno())
        part.chmod(0o644)
        part.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the error is also the response, and holds the connection
        raise DataError(f"{file.url} cannot be downloaded into {folder}: {_why(error)}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def _copy(file: File, answer: IO[bytes], output: IO[bytes]) -> None:
    """Writes a response as long as it can be the file.

    Raises:
      DataError: It is not the file.
    """
    total, digest = 0, hashlib.sha256()
    while total <= file.nbytes and (some := answer.read(_AT_ONCE)):
        total += len(some)
        digest.update(some)
        output.write(some)
    if total != file.nbytes:
        more = "more than" if total > file.nbytes else f"{total} of"
        raise DataError(
            f"{file.url} returned {more} the {file.nbytes} published bytes: try again, or put the "
            "file into the folder of your data (data.data_dir)"
        )
    if digest.hexdigest() != file.sha256:
        raise DataError(
            f"{file.url} returned a file with SHA-256 {digest.hexdigest()}, expected "
            f"{file.sha256}: it was modified in transit or at the source, and is not used"
        )


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server responded {error.code} {error.reason}"
    reason = getattr(error, "reason", None)
    if isinstance(error, urllib.error.URLError) and isinstance(reason, OSError):
        return explain(reason)
    return explain(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
