"""The folder of a run: how it is named, and how a run holds it against a second one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipar_jax.config import Config, to_json
from pipar_jax.config.checkpoints import check_resume, resumed
from pipar_jax.disk.files import check_folder, describe_os_error, numbered, write_text
from pipar_jax.disk.locks import held
from pipar_jax.errors import DiskError
from pipar_jax.report import environment

#: The file in a run's folder that is locked while the run lasts; it has the holder's number.
LOCK = "lock"
#: Seconds for which a second run waits: the processes of a killed launcher take a moment to end.
ENDING_S = 5.0


class HeldFolder(NamedTuple):
    """The folder of a run that no other run can write to.

    Attributes:
      path: The folder.
      lock: The descriptor of its lock. A process that inherits it holds the folder as well.
    """

    path: Path
    lock: int


def check_place(config: Config) -> None:
    """Checks that a run can have its folder, before its data are read and its hosts started.

    Args:
      config: Resolved configuration.

    Raises:
      ConfigError: ``run.dir`` is a file, or this user may not make it or write in it.
    """
    past, place = resumed(config.name, config.run), Path(config.run.dir)
    if past is not None and past.required:
        return  # its folder is there, or ``hold_folder`` refuses it
    if past is not None and os.path.isdir(past.folder):
        place = past.folder
    check_folder(place, f"run.dir={config.run.dir!r}")


@contextlib.contextmanager
def hold_folder(config: Config) -> Iterator[HeldFolder]:
    """Creates a run's folder with config.json and environment.json, and holds it in the block.

    If the name is taken, a number is appended: ``runs/digits``, ``runs/digits-2``. A run that is
    resumed (``run.resume``) continues in its own folder. ``config.run.dir`` and ``config.name`` are
    set, so that ``run.dir/name`` is the folder on every host.

    Raises:
      ConfigError: ``run.resume`` names a run that this configuration cannot continue.
      DiskError: The folder cannot be created or written.
      RunError: Another run is writing to the folder that is to be resumed.
    """
    check_resume(config)
    past = resumed(config.name, config.run)
    if past is not None:
        config.run.dir, config.name = str(past.folder.parent), past.folder.name
    with contextlib.ExitStack() as stack:
        try:
            folder = _create(config, again=past is not None)
            lock = stack.enter_context(held(folder / LOCK, ENDING_S))
            (folder / "logs").mkdir(exist_ok=past is not None)
            write_text(folder / "config.json", to_json(config))
            environment.write(folder, config.network.token)
        except DiskError as error:
            raise DiskError(f"the run's folder cannot be created: {error}") from error
        except OSError as error:
            error.filename = error.filename or str(Path(config.run.dir) / config.name)
            raise DiskError(
                f"the run's folder cannot be created: {describe_os_error(error)}"
            ) from error
        yield HeldFolder(folder, lock)


def _create(config: Config, *, again: bool) -> Path:
    """Makes the folder and returns it; it may exist for a run that continues.

    Raises:
      OSError: It cannot be made.
    """
    base, names = Path(config.run.dir), numbered(config.name)
    base.mkdir(parents=True, exist_ok=True)
    while True:
        config.name = next(names)
        try:
            (base / config.name).mkdir(exist_ok=again)
        except FileExistsError:
            continue
        return base / config.name
