"""A device's ledger on its own disk: what is about to leave is there before it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipar_jax.disk.files import describe_reading, make_folder, refused
from pipar_jax.disk.json_text import JsonObject, dumps
from pipar_jax.errors import RunError
from pipar_jax.privacy.spending import Entry, Spending

#: Name of the file in a host's folder.
LEDGER = "privacy.jsonl"
#: Field of a line that was copied: the ledger that it is of.
_SOURCE = "source"
_RELEASE: dict[str, Callable[[Any], Any]] = {"group": str, "step": int, "cost": float}
_LABELS: dict[str, Callable[[Any], Any]] = {"response": str, "epsilon": float}


class PrivacyLedger:
    """Appends a line for each release and syncs it to disk, so that it survives any crash.

    A ledger that is there is continued: repeated steps, repeated rounds, resumed runs and runs that
    begin anew under the same name are further releases of the same records. Lines of earlier
    folders are copied into it, so that they count as well when this run is continued in its turn.
    Not safe for use by several threads.

    Attributes:
      spending: What the lines come to.

    Args:
      folder: The host's folder; created with the first line.
      earlier: Folders of runs that this one continues, whose ledgers count as well.

    Raises:
      RunError: A ledger cannot be read, or is damaged other than at its end.
    """

    def __init__(self, folder: Path, earlier: tuple[Path, ...] = ()) -> None:
        self.spending = Spending()
        self._path = folder / LEDGER
        self._file: int | None = None
        own, self._whole = _read(self._path)
        #: Lines of earlier ledgers that are not in this one yet.
        self._owed: list[JsonObject] = []
        for one in earlier:
            source = str((one / LEDGER).resolve())
            lines, _ = _read(one / LEDGER)
            # Ledgers only grow, so that those copied already are the first ones.
            copied = sum(values.get(_SOURCE) == source for values in own)
            self._owed += [{**values, _SOURCE: source} for values in lines[copied:]]
        for values in (*own, *self._owed):
            if "response" in values:
                self.spending.add_labels(values["response"], values["epsilon"])
            else:
                self.spending.add(Entry(values["group"], values["step"], values["cost"]))

    def add(self, entry: Entry, what: tuple[str, ...]) -> None:
        """Writes an entry; once this returns it is on disk, and what it speaks of may be sent.

        Args:
          entry: The entry.
          what: What is released, in words.

        Raises:
          DiskError: It cannot be written.
        """
        self._append({**entry._asdict(), "what": list(what)})
        self.spending.add(entry)

    def add_labels(self, response: str, epsilon: float) -> None:
        """Writes that labels are released by a randomised response; once for each response.

        Raises:
          DiskError: It cannot be written.
        """
        self._append({"response": response, "epsilon": epsilon})
        self.spending.add_labels(response, epsilon)

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, values: JsonObject) -> None:
        with refused(self._path):
            if self._file is None:
                make_folder(self._path.parent)
                new = not self._path.exists()
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                # A line that a crash has cut short is not on disk, so nothing was sent for it.
                os.ftruncate(self._file, self._whole)
                if new:
                    folder = os.open(self._path.parent, os.O_RDONLY)
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)
            lines = "".join(dumps(one) + "\n" for one in (*self._owed, values)).encode()
            written = 0
            while written < len(lines):
                written += os.write(self._file, lines[written:])
            os.fsync(self._file)
            self._owed = []


def _read(path: Path) -> tuple[list[JsonObject], int]:
    """Returns the lines of a ledger that are whole, none if there is no ledger, and their bytes.

    Raises:
      RunError: It cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise RunError(f"{path} cannot be read: {describe_reading(error)}") from error
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            values = json.loads(line)
            fields = _LABELS if "response" in values else _RELEASE
            lines.append(values | {name: kind(values[name]) for name, kind in fields.items()})
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number}, is damaged: what left this device is unknown; restore "
                "the file, or begin a run under another name and account for both yourself"
            ) from error
    return lines, whole
