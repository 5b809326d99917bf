"""Timetables: CSV files whose rows are valid from their time on, such as rates over a drive."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from comms.errors import ChannelError

TIME = "time_s"


def read_timetable(path: str | Path, columns: Sequence[str]) -> list[tuple[float, ...]]:
    """Reads rows of a time and values, each valid until the next.

    Lines that begin with ``#`` are comments; the first other line names the columns.

    Args:
      path: The file.
      columns: Names of the columns after ``time_s``.

    Returns:
      Rows (time, value, …) in increasing order of time, the first at 0 s.

    Raises:
      ChannelError: The file cannot be read, a column is missing, a field is not a number, or times
        do not increase from 0; the message names file and line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChannelError(f"{path} cannot be read: {error}") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    wanted = [TIME, *columns]
    if not numbered:
        raise ChannelError(f"{path} is empty: its first line must be {','.join(wanted)}")
    names = [name.strip() for name in next(csv.reader([numbered[0][1]]))]
    if sorted(names) != sorted(wanted):
        raise ChannelError(
            f"{path}, line {numbered[0][0]}: the columns must be {','.join(wanted)}, got "
            f"{','.join(names)}"
        )
    rows: list[tuple[float, ...]] = []
    for number, line in numbered[1:]:
        row = _row(f"{path}, line {number}", names, wanted, line)
        if row[0] != 0 and not rows:
            raise ChannelError(f"{path}, line {number}: the first time must be 0, got {row[0]:g}")
        if rows and row[0] <= rows[-1][0]:
            raise ChannelError(
                f"{path}, line {number}: times must rise, got {row[0]:g} after {rows[-1][0]:g}"
            )
        rows.append(row)
    if not rows:
        raise ChannelError(f"{path} has no rows: give at least time 0")
    return rows


def _row(where: str, names: Sequence[str], wanted: Sequence[str], line: str) -> tuple[float, ...]:
    """Returns the numbers of a line in the requested order."""
    fields = next(csv.reader([line]))
    if len(fields) != len(names):
        raise ChannelError(f"{where}: expected {len(names)} fields, got {len(fields)}")
    values = {}
    for name, field in zip(names, fields, strict=True):
        try:
            values[name] = float(field)
        except ValueError as error:
            raise ChannelError(f"{where}: {name} is {field!r}, expected a number") from error
        if not math.isfinite(values[name]):
            raise ChannelError(f"{where}: {name} is {field!r}, expected a finite number")
    return tuple(values[name] for name in wanted)
