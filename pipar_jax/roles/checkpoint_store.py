"""A run's checkpoints on disk: Orbax's CheckpointManager, loaded when the first is needed.

A checkpoint is named by the number of rounds that were over. It has an item of arrays, by copy,
part, unit and path, and an item of JSON. Orbax refuses arrays without elements, so their shapes are
in the JSON. Writing goes on in the background; a checkpoint is there as a whole or not at all, by a
rename, and its digest tells whether its bytes are those that were written.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from comms.arrays import Array
from pipar_jax.config import CheckpointConfig
from pipar_jax.config.checkpoints import CHECKPOINTS, FACTS, STATE, read_facts, rounds_kept
from pipar_jax.errors import ConfigError, DiskError, RunError
from pipar_jax.runtime.priority import lower_priority
from pipar_jax.runtime.unit_state import Tensors

#: Beyond the arrays themselves: JSON, indices, and one that is being written.
_SPARE_BYTES = 1 << 20
#: What Orbax has in the name of a checkpoint that is not complete.
_UNFINISHED = ".orbax-checkpoint-tmp"


class Kept(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      rounds: How many rounds were over.
      tensors: Arrays by name, as ``unit_state.pack`` names them.
      facts: What else was kept.
    """

    rounds: int
    tensors: Tensors
    facts: dict[str, Any]


class CheckpointStore:
    """Writes a run's checkpoints and reads the newest.

    Args:
      folder: The run's folder.
      config: How many are kept, and whether the best is.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._path, self._config = folder / CHECKPOINTS, config
        self._folder = folder
        self._manager: Any = None
        # Orbax's threads are started by this one and have its priority: training goes first.
        self._writer = futures.ThreadPoolExecutor(1, "pipar-checkpoint", lower_priority)

    def check_space(self, nbytes: int) -> None:
        """Refuses to begin where the disk cannot hold as many checkpoints as are to be kept.

        Args:
          nbytes: Bytes of one.

        Raises:
          DiskError: It cannot.
        """
        _sweep(self._path)
        number = self._config.keep + bool(self._config.best) + 1  # the one that is being written
        there = len(rounds_kept(self._folder))
        needed = max(number - there, 1) * (nbytes + _SPARE_BYTES)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise DiskError(
                f"{self._path} cannot hold checkpoint.keep={self._config.keep} checkpoints of "
                f"{nbytes / 1e6:.1f} MB each: {free / 1e6:.1f} MB are free and "
                f"{needed / 1e6:.1f} MB needed; free some, lower checkpoint.keep, or choose "
                "another folder with --config.run.dir"
            )

    def save(
        self, rounds: int, tensors: Tensors, facts: Mapping[str, Any], score: float | None
    ) -> None:
        """Begins to write a checkpoint and returns once its arrays are copied.

        Args:
          rounds: How many rounds are over.
          tensors: Arrays by name.
          facts: JSON-ready values.
          score: What ``checkpoint.best`` compares, the higher the better; None if unknown.

        Raises:
          DiskError: It could not be written.
        """
        ocp = _orbax()

        empty = {
            name: [one.dtype.name, *one.shape] for name, one in tensors.items() if not one.size
        }
        said = {**facts, "empty": empty, "digest": _digest(tensors)}
        tree: dict[str, Any] = {}
        for name, array in tensors.items():
            if array.size:
                copy, part, unit, path = name.split("/", 3)
                inner = tree.setdefault(copy, {}).setdefault(part, {}).setdefault(unit, {})
                inner[path] = array
        manager = self._open()
        with _disk(self._path):
            begun = self._writer.submit(
                manager.save,
                rounds,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.PyTreeSave(tree), FACTS: ocp.args.JsonSave(said)}
                ),
                metrics=None if score is None else {"score": score},
            ).result()
        if not begun:
            raise DiskError(
                f"a checkpoint in {self._path} cannot be written: there is one of a later round "
                f"than {rounds} already"
            )

    def leave_behind(self, rounds: int) -> list[int]:
        """Removes the checkpoints of later rounds, which a run that has gone back leaves behind.

        Orbax writes none that is older than one that is there, and who resumes would take the
        newest. To be called before the first is saved.

        Args:
          rounds: The rounds of the checkpoint that the run goes on from.

        Returns:
          The rounds of those that were removed.

        Raises:
          DiskError: One cannot be removed.
        """
        if not self._path.is_dir():
            return []
        there = sorted(int(one.name) for one in self._path.iterdir() if one.name.isdigit())
        later = [number for number in there if number > rounds]
        for number in reversed(later):
            path = self._path / str(number)
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise DiskError(
                    f"{path} is of a later round than the checkpoint that the run goes on from, "
                    f"and cannot be removed: {error}"
                ) from error
        return later

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
          DiskError: It could not be written.
        """
        if self._manager is not None:
            with _disk(self._path):  # on the one thread that saves: each hears of a failure once
                self._writer.submit(self._manager.wait_until_finished).result()

    def close(self) -> None:
        """Waits for what is being written, and ends the threads."""
        manager, self._manager = self._manager, None
        try:
            if manager is not None:
                with _disk(self._path):
                    self._writer.submit(manager.close).result()
        finally:
            self._writer.shutdown()

    def _open(self) -> Any:
        if self._manager is None:
            ocp = _orbax()
            from orbax.checkpoint import checkpoint_managers as policies

            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["score"], n=1,
                keep_checkpoints_without_metrics=False,
            )  # fmt: skip
            newest = policies.LatestN(self._config.keep)
            kept = policies.AnyPreservationPolicy([newest, *([best] if self._config.best else [])])
            options = ocp.CheckpointManagerOptions(
                preservation_policy=kept, cleanup_tmp_directories=True
            )
            handlers = {
                # Weights hardly shrink: compressing 190 MB saved 7 % and took half of the time.
                STATE: ocp.PyTreeCheckpointHandler(use_compression=False),
                FACTS: ocp.JsonCheckpointHandler(),
            }
            with _disk(self._path):
                self._manager = ocp.CheckpointManager(
                    self._path, options=options, item_handlers=handlers
                )
        return self._manager


def read_newest(folder: Path, newest: int | None, tell: Callable[[int, str], None]) -> Kept | None:
    """Returns the newest checkpoint of a run that is whole, or None if there is none.

    Args:
      folder: The run's folder.
      newest: The newest that may be taken; None for any.
      tell: Takes each one that cannot be read, and why.
    """
    for rounds in reversed(rounds_kept(folder)):
        if newest is None or rounds <= newest:
            try:
                return read(folder, rounds)
            except (ConfigError, RunError) as error:
                tell(rounds, str(error))
    return None


def read(folder: Path, rounds: int) -> Kept:
    """Returns a checkpoint of a run.

    Raises:
      ConfigError: It says nothing that can be read.
      RunError: Its arrays cannot be read, or are not those that were written.
    """
    ocp = _orbax()

    facts = read_facts(folder, rounds)
    path = folder / CHECKPOINTS / str(rounds)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path / STATE)
        tensors = {
            f"{copy}/{part}/{unit}/{name}": np.asarray(array)
            for copy, parts in tree.items()
            for part, units in parts.items()
            for unit, arrays in units.items()
            for name, array in arrays.items()
        }
        for name, (dtype, *shape) in facts["empty"].items():
            tensors[name] = np.zeros(shape, np.dtype(dtype))
        whole = _digest(tensors) == facts["digest"]
    except Exception as error:  # whatever damaged bytes make of Orbax and its libraries
        words = " ".join(str(error).split())[:300]
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {words}") from error
    if not whole:
        raise RunError(f"{path} is damaged: its arrays are not those that were written")
    return Kept(rounds, tensors, facts)


def _orbax() -> Any:
    """Returns Orbax, whose log of every step on standard error is limited to warnings."""
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.WARNING)
    return orbax.checkpoint


def _digest(tensors: Mapping[str, Array]) -> str:
    """Returns what tells one set of named arrays from another."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        # Viewed as bytes without a copy, where it lies in C order.
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


#: What Orbax and its libraries say where a disk is full.
_FULL = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota exceeded")


def _sweep(path: Path) -> None:
    """Removes what is left of checkpoints that could not be written; the next ones need the room.

    Orbax does so when it opens the folder, which a run does after it has looked for room.
    """
    for part in path.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns whatever Orbax raises while it writes into one error that names the folder."""
    try:
        yield
    except Exception as error:
        _sweep(path)
        words = " ".join(str(error).split())[:300]
        reason = f"{type(error).__name__}: {words}"
        if any(one in str(error) for one in _FULL):
            reason = "no space is left on the disk"
        raise DiskError(f"a checkpoint in {path} cannot be written: {reason}") from error
