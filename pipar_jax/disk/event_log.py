"""The event log of a run: ``metrics.jsonl``, with one row per event."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from pipar_jax.disk.files import refused, write_text
from pipar_jax.disk.json_text import JsonMapping, JsonObject, dumps
from pipar_jax.errors import RunError

Event: TypeAlias = JsonMapping
"""What a run reports: its kind under ``event``, and what else that kind has."""
OnEvent: TypeAlias = Callable[[JsonObject], None]
"""Takes each event of a run as it happens."""


def score_of(event: Event, name: str) -> float | None:
    """Returns a score of an event: its loss, or one of its metrics by name.

    None if it has none of that name, or the score is not finite.
    """
    value = event.get(name) if name == "loss" else event.get("metrics", {}).get(name)
    return None if value is None else float(value)


class EventLog:
    """Appends rows atomically.

    Args:
      path: The file, which must not exist, so that rows of two runs do not mix.
      rows: Rows that it begins with, if a run is resumed: they replace the file.

    Raises:
      DiskError: The file cannot be created.
      RunError: The file exists, and no rows are given.
    """

    def __init__(self, path: Path, rows: Sequence[JsonMapping] | None = None) -> None:
        """Creates the file."""
        self.path = path
        if rows is not None:
            write_text(path, "".join(f"{dumps(row)}\n" for row in rows))
            return
        try:
            with refused(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except RunError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            raise RunError(
                f"{path} belongs to another run: give this one another name (--config.name) or "
                "folder (--config.run.dir)"
            ) from error

    def add(self, event: Event) -> None:
        """Appends a row and flushes it to the operating system.

        Raises:
          DiskError: The row cannot be written; no part of it is written then.
        """
        row = dumps(event).encode() + b"\n"
        with refused(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    while row:
                        row = row[os.write(descriptor, row) :]
                except OSError:
                    with contextlib.suppress(OSError):  # not for a device file
                        os.ftruncate(descriptor, size)  # a partial row would corrupt the next one
                    raise
            finally:
                os.close(descriptor)


def read_events(path: Path, field: str = "event") -> tuple[JsonObject, ...]:
    """Returns the rows of a file, without a truncated last one.

    Args:
      path: The file.
      field: A field that every row has.

    Raises:
      OSError: The file cannot be read.
      RunError: A line other than the last is not a row.
    """
    *lines, torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}", field))
    if torn.strip():
        with contextlib.suppress(RunError):
            rows.append(_row(torn, str(path), field))
    return tuple(rows)


def _row(line: bytes, where: str, field: str) -> JsonObject:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise RunError(f"{where} is not a row of events: {error}") from error
    if not isinstance(event, dict) or field not in event:
        raise RunError(f"{where} is not a row of events: it has no field {field!r}")
    return event
