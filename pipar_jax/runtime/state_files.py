"""A host's own states on its own disk, so that they need not travel to be kept."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from comms.arrays import Array
from comms.errors import ChannelError
from pipar_jax.disk.files import describe_reading, make_folder, write_tensors
from pipar_jax.disk.json_text import dumps
from pipar_jax.errors import RunError
from pipar_jax.runtime.priority import lower_priority
from pipar_jax.runtime.unit_state import Tensors

#: How many of a run's are kept: the coordinator may have to go back by one checkpoint.
KEPT = 2
_NAME = re.compile(r"([0-9a-f]{1,32})-(\d{1,10})\.safetensors")


class StateTag(NamedTuple):
    """What states belong to.

    Attributes:
      run: The run's own name, which no other run has.
      rounds: How many rounds were over.
    """

    run: str
    rounds: int


class StateFiles:
    """Writes states on a thread of its own, and reads them.

    Args:
      name: The host's name.
      folders: Where states are looked for; they are written into the first.
      done: Takes each tag whose states were written, and why they could not be, or None.
    """

    def __init__(
        self, name: str, folders: Sequence[Path], done: Callable[[StateTag, str | None], None]
    ) -> None:
        self._name, self._folders, self._done = name, tuple(folders), done
        self._queue: queue.SimpleQueue[tuple[StateTag, Tensors] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def save(self, tag: StateTag, tensors: Tensors) -> None:
        """Begins to write states; their arrays must not change any more."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"pipar-keep-{self._name}", daemon=True
            )
            self._thread.start()
        self._queue.put((tag, tensors))

    def load(self, tag: StateTag) -> Tensors:
        """Returns the states of a tag.

        Raises:
          RunError: They are not there, or cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        reason = "there is none"
        for folder in self._folders:
            path = folder / f"{tag.run}-{tag.rounds}.safetensors"
            if not path.is_file():
                continue
            try:
                with safe_open(path, framework="numpy") as file:
                    said = json.loads((file.metadata() or {})["pipar_jax"])
                    if said == {"host": self._name, **tag._asdict()}:
                        return {one: file.get_tensor(one) for one in file.keys()}  # noqa: SIM118
                    reason = f"{path} is of {said}"
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                reason = f"{path} cannot be read: {describe_reading(error)}"
        raise RunError(
            f"no optimiser state of {self._name} after round {tag.rounds} in "
            f"{self._folders[0]}: {reason}"
        )

    def newest(self, tag: StateTag) -> list[tuple[int, Tensors]]:
        """Returns the newest states of a run that can be read, and their rounds; at most one.

        Args:
          tag: The run, and the most rounds that they may be of.
        """
        there = {rounds for folder in self._folders for rounds, _ in _own(folder, tag.run)}
        for rounds in sorted(there, reverse=True):
            if rounds <= tag.rounds:
                with contextlib.suppress(RunError):
                    return [(rounds, self.load(tag._replace(rounds=rounds)))]
        return []

    def leave_behind(self, tag: StateTag) -> None:
        """Removes the states of a run that are of no use after a tag: see ``_outdated``."""
        for path in _outdated(self._folders[0], tag):
            with contextlib.suppress(OSError):  # it only takes room
                path.unlink()

    def close(self) -> None:
        """Waits for what is being written, and ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        lower_priority()
        while (item := self._queue.get()) is not None:
            tag, tensors = item
            reason = None
            try:
                self._write(tag, tensors)
            except Exception as error:  # told to whoever asked: training goes on without
                reason = " ".join(str(error).split()) or type(error).__name__
            with contextlib.suppress(ChannelError):  # whoever asked is gone
                self._done(tag, reason)

    def _write(self, tag: StateTag, tensors: Mapping[str, Array]) -> None:
        folder = make_folder(self._folders[0])
        said = dumps({"host": self._name, **tag._asdict()})
        path = folder / f"{tag.run}-{tag.rounds}.safetensors"
        arrays = {name: np.asarray(one, order="C") for name, one in tensors.items()}
        write_tensors(path, arrays, {"pipar_jax": said})
        self.leave_behind(tag)


def _own(folder: Path, run: str) -> list[tuple[int, Path]]:
    """Returns the files of states of a run in a folder, and their rounds."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # nothing was written there
        return []
    found = [match for name in names if (match := _NAME.fullmatch(name)) and match[1] == run]
    return [(int(match[2]), folder / match[0]) for match in found]


def _outdated(folder: Path, tag: StateTag) -> list[Path]:
    """Returns the states of a run that two newer ones have superseded, and those of later rounds.

    These are of a past that the run does not know any more, since it has gone back.
    """
    own = sorted(_own(folder, tag.run))
    older = [path for rounds, path in own if rounds <= tag.rounds]
    return [*older[:-KEPT], *(path for rounds, path in own if rounds > tag.rounds)]
