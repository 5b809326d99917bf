"""Data that stay home: each host reads its own from a file or from a function of its user's."""

from __future__ import annotations

import importlib
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipar_jax.data.types import Dataset, empty_split, make_split
from pipar_jax.errors import DataError


def load_own(source: str, device: int | None, *, part: str, classes: int = 0) -> Dataset:
    """Returns the data that a host brings itself.

    A file ``npz:PATH`` or the mapping that ``module:NAME:FUNCTION`` returns holds ``x_train`` and
    ``y_train`` (on a device) or ``x_test`` and ``y_test`` (on the server), and may hold
    ``classes`` (else the highest label + 1) and ``mean`` and ``std`` per channel (else uint8
    images are divided by 255 and others taken as they are). The function is called with the
    device's index, or None on the server.

    Args:
      source: ``npz:PATH`` or ``module:NAME:FUNCTION``.
      device: The device's index; None on the server.
      part: ``train`` or ``test``: the split that this host needs; the other stays empty.
      classes: Number of classes if the configuration says it, else 0. A device may lack the
        highest label, yet all hosts must build one model.

    Raises:
      DataError: The source cannot be read, or does not hold what it must.
    """
    kind, _, rest = source.partition(":")
    values = _read_npz(rest, part) if kind == "npz" else _call(rest, device)
    missing = [name for name in _names(part)[:2] if name not in values]
    if missing:
        raise DataError(
            f"{source!r} has no {' and no '.join(missing)}: a device needs x_train and y_train, "
            "the server x_test and y_test (or set data.test_source)"
        )
    split = make_split(values[f"x_{part}"], values[f"y_{part}"], repr(source))
    if not len(split):
        raise DataError(f"{source!r}: x_{part} holds no sample")
    height, width, channels = split.images.shape[1:]
    shape = (height, width, channels)
    highest = int(split.labels.max())
    classes = classes or int(values.get("classes", highest + 1))
    if highest >= classes:
        raise DataError(
            f"{source!r}: label {highest} is beyond classes={classes}, counted from 0: raise "
            "data.classes, or `classes` beside the arrays"
        )
    scale = 255.0 if split.images.dtype == np.uint8 else 1.0
    return Dataset(
        source=source,
        train=split if part == "train" else empty_split(shape),
        test=split if part == "test" else empty_split(shape),
        classes=classes,
        input_shape=shape,
        mean=_per_channel(values.get("mean", 0.0), channels, f"{source!r}: mean"),
        std=_per_channel(values.get("std", scale), channels, f"{source!r}: std"),
    )


def _names(part: str) -> tuple[str, ...]:
    return (f"x_{part}", f"y_{part}", "classes", "mean", "std")


def _read_npz(path: str, part: str) -> dict[str, Any]:
    file = pathlib.Path(path).expanduser()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file} is no .npz file: write it with numpy.savez")
            # Arrays are decompressed when they are asked for: leave those of the other part.
            return {name: arrays[name] for name in arrays.files if name in _names(part)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"own data npz:{path} cannot be read: {error}") from error


def _call(rest: str, device: int | None) -> Mapping[str, Any]:
    name, _, function = rest.partition(":")
    try:
        made = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"own data module:{rest} cannot be found: {error}; it must be importable from the "
            "folder in which the command runs"
        ) from error
    values = made(device)
    if not isinstance(values, Mapping):
        raise DataError(
            f"own data module:{rest} must return a mapping with x_train and y_train, or x_test and "
            f"y_test, got {type(values).__name__}"
        )
    return values


def _per_channel(value: Any, channels: int, what: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    made = np.asarray(value, np.float32).reshape(-1)
    if made.size not in (1, channels) or not np.isfinite(made).all():
        raise DataError(f"{what} must be one number, or one for each of {channels} channels")
    if what.endswith("std") and (made <= 0).any():
        raise DataError(f"{what} must be above 0, got {made.tolist()}")
    return np.broadcast_to(made, (channels,)).copy()
