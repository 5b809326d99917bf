"""Decoded data sets on disk: .npy files that all processes of a machine map and share.

Decoding 60,000 PNG images takes seconds, mapping a file takes none, and a page that several
processes map is in memory once.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np

from pipar_jax.data.types import Dataset, Examples
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonObject, dumps
from pipar_jax.disk.locks import locked
from pipar_jax.errors import DataError

FORMAT = 1


def cache_folder(cache_dir: str) -> pathlib.Path:
    """Returns the folder for decoded arrays: the given one, or the user's cache folder."""
    if cache_dir:
        return pathlib.Path(cache_dir).expanduser()
    return user_cache() / "data"


def user_cache() -> pathlib.Path:
    """Returns the project's folder in the user's cache folder; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "pipar_jax"


def cached(folder: pathlib.Path, key: str, decode: Callable[[], Dataset]) -> Dataset:
    """Returns a data set from the cache, after decoding it if it is missing.

    Concurrent processes wait for the first to decode. Arrays are memory-mapped.

    Args:
      folder: Folder of all decoded data sets.
      key: Name of the data set and its version; a folder in ``folder``.
      decode: Decodes the data set.

    Raises:
      DataError: The folder cannot be written, or the disk is full.
    """
    home = folder / key
    try:
        if not (home / "about.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{key}.lock"):
                if not (home / "about.json").exists():
                    _write(home, decode())
        return _read(home)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"decoded data cannot be saved in {home}: {describe_reading(error)}; free some space, "
            "delete that folder, or choose another with --config.data.cache_dir"
        ) from error


def _write(home: pathlib.Path, data: Dataset) -> None:
    # Atomic: files are written to a temporary folder, which is renamed at the end.
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        for name, split in (("train", data.train), ("test", data.test)):
            np.save(aside / f"{name}_images.npy", split.x, allow_pickle=False)
            np.save(aside / f"{name}_labels.npy", split.labels, allow_pickle=False)
        assert data.mean is not None and data.std is not None  # public sets have both
        about = {
            "format": FORMAT,
            "source": data.source,
            "classes": data.classes,
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
        }
        (aside / "about.json").write_text(dumps(about))
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(home: pathlib.Path) -> Dataset:
    about: JsonObject = json.loads((home / "about.json").read_text())

    def split(name: str) -> Examples:
        images = np.load(home / f"{name}_images.npy", mmap_mode="r", allow_pickle=False)
        return Examples.of(images, np.load(home / f"{name}_labels.npy", allow_pickle=False))

    train, test = split("train"), split("test")
    return Dataset(
        source=about["source"],
        train=train,
        test=test,
        classes=about["classes"],
        mean=np.asarray(about["mean"], np.float32),
        std=np.asarray(about["std"], np.float32),
    )
