"""Own data, which never leave their host: read from a file or by the user's function."""

from __future__ import annotations

import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from comms.arrays import Array
from comms.errors import explain
from pipar_jax.config import DataConfig, plugins
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data.admission import Part, assemble
from pipar_jax.data.types import Dataset
from pipar_jax.errors import DataError
from stages.tasks.targets import TargetRule

#: What may come with the arrays.
_ABOUT = ("classes", "scale", "mean", "std")


def load_own(
    source: str, device: int | None, config: DataConfig, *, part: Part, rule: TargetRule
) -> Dataset:
    """Returns the own data of a host.

    A file ``npz:PATH``, a folder ``npy:FOLDER`` of files NAME.npy, or the mapping that
    ``module:NAME:FUNCTION`` returns contains ``x_train`` and ``y_train`` (on a device) or
    ``x_test`` and ``y_test`` (on the server); side inputs ``x_train.NAME``; further targets
    ``y_train.NAME``; and optionally ``classes`` (else the highest label + 1), ``scale``, and
    ``mean`` and ``std`` per channel, and with data.pad_to ``lengths_train``, ``lengths_test``. The
    files of a folder are memory-mapped: samples are read when they are used. The function is called
    with the device's index, or None on the server.

    With data.normalise=given the input of the network is ``(x / scale - mean) / std``. Without any
    of the three, floats are used unchanged; whole numbers are rejected, since their dtype does not
    tell whether they are pixels or tokens: ``scale`` (or ``std``), or data.normalise=none, is
    required.

    Args:
      source: ``npz:PATH``, ``npy:FOLDER`` or ``module:NAME:FUNCTION``.
      device: The device's index; None on the server.
      config: Number of classes, scale and normalisation. A device may lack the highest label, yet
        all hosts must build the same model.
      part: ``train`` or ``test``: the split that this host needs; the other stays empty.
      rule: What the task needs targets to be.

    Raises:
      DataError: The source cannot be read, or an array is missing or not valid.
    """
    kind, _, rest = source.partition(":")
    read = {"npz": _read_npz, "npy": _read_npy}.get(kind)
    values = _call(rest, device) if read is None else read(rest, part)
    groups = {end: _group(values, f"{end}_{part}", end) for end in "xy"}
    missing = [f"{end}_{part}" for end, arrays in groups.items() if not arrays]
    if missing:
        raise DataError(
            f"{source!r} has no {' and no '.join(missing)}: a device needs x_train and y_train, "
            "the server x_test and y_test (or set data.test_source)"
        )
    lengths = values.get(f"lengths_{part}")
    if lengths is not None and not config.pad_to:
        raise DataError(
            f"{source!r} has lengths_{part}, which only data.pad_to reads: set it, or leave them "
            "out"
        )
    mean, std = _normalisation(values, config, repr(source))
    made = assemble(
        source, part, groups["x"], groups["y"], classes=config.classes or values.get("classes", 0),
        mean=mean, std=std, rule=rule, where=repr(source), pad_to=whole_numbers(config.pad_to),
        lengths=lengths,
    )  # fmt: skip
    x = (made.train if part == "train" else made.test).x
    scaled = config.scale or values.keys() & {"scale", "std"}
    if x.dtype.kind in "iu" and not scaled and config.normalise != "none":
        raise DataError(
            f"{source!r}: the input is {x.dtype}, and its scale is unknown: give `scale` with the "
            "arrays or set data.scale (255 for pixels), give `mean` and `std`, or set "
            "data.normalise=none for whole numbers such as tokens"
        )
    return made


def _group(values: Mapping[str, Any], name: str, main: str) -> dict[str, Any]:
    """Returns ``x_train`` and ``x_train.mask`` as {"x": …, "mask": …}."""
    made = {main: values[name]} if name in values else {}
    for key in values:
        if isinstance(key, str) and key.startswith(f"{name}."):
            made[key.removeprefix(f"{name}.")] = values[key]
    return made


def _belongs(name: str, part: str) -> bool:
    """Returns whether an array is one of a part, or is about all of them."""
    stem = name.partition(".")[0]
    return stem in (f"x_{part}", f"y_{part}", f"lengths_{part}") or name in _ABOUT


def _normalisation(values: Mapping[str, Any], config: DataConfig, where: str) -> tuple[Any, Any]:
    """Returns the mean and standard deviation given, in units of the stored input, or None."""
    said = {
        name: _number(values[name], f"{where}: {name}") for name in _ABOUT[1:] if name in values
    }
    scale = config.scale
    if config.normalise == "none":
        return None, None
    if scale and "scale" in said and (said["scale"] != scale).any():
        raise DataError(
            f"{where}: scale={said['scale'].tolist()} with the arrays contradicts data.scale="
            f"{scale:g}: omit one of them"
        )
    if scale:
        said["scale"] = np.asarray(scale)
    if not said.keys() & {"scale", "std"} and "mean" not in said:
        return None, None
    factor = said.get("scale", np.ones(()))
    if factor.size != 1 or not 0 < factor.item() < np.inf:
        raise DataError(f"{where}: scale must be one number above 0, got {factor.tolist()}")
    return said.get("mean", np.zeros(())) * factor, said.get("std", np.ones(())) * factor


def _number(value: object, what: str) -> Array:
    try:
        return np.asarray(value, np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} must be numbers, got {value!r}") from error


def stored_samples(source: str) -> int | None:
    """Returns how many training samples a file or folder has, without reading them.

    Args:
      source: See ``load_own``.

    Returns:
      The number, or None where it is not known before the data are loaded: they come from a
      function, or cannot be read.
    """
    kind, _, rest = source.partition(":")
    path = pathlib.Path(rest).expanduser()
    try:
        if kind == "npy":
            shape = np.load(path / "x_train.npy", mmap_mode="r", allow_pickle=False).shape
        elif kind == "npz":
            with zipfile.ZipFile(path) as archive, archive.open("x_train.npy") as member:
                first = np.lib.format.read_magic(member) == (1, 0)
                read = (
                    np.lib.format.read_array_header_1_0
                    if first
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, _ = read(member)
        else:
            return None
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
        return None  # whoever loads them says why
    return int(shape[0]) if shape else None


def _read_npz(path: str, part: str) -> dict[str, Any]:
    file = pathlib.Path(path).expanduser()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file} is not an .npz file: write it with numpy.savez")
            # Arrays are decompressed on access: skip those of the other part.
            return {name: arrays[name] for name in arrays.files if _belongs(name, part)}
    except FileNotFoundError as error:
        raise DataError(f"own data npz:{path} cannot be read: there is no file {file}") from error
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        why = explain(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        # numpy's message recommends unpickling, which could execute arbitrary code.
        if "pickle" in why:
            why = (
                "it contains Python objects, expected arrays of numbers"
                if zipfile.is_zipfile(file)
                else "it is not an .npz file: write it with numpy.savez"
            )
        raise DataError(f"own data npz:{path} cannot be read: {why}") from error


def _read_npy(path: str, part: str) -> dict[str, Any]:
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"own data npy:{path} cannot be read: there is no folder {folder}")
    values = {}
    for file in sorted(folder.glob("*.npy")):
        if _belongs(file.stem, part):
            try:
                values[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                why = explain(error) if isinstance(error, OSError) else str(error)
                if "pickle" in why:  # numpy's message recommends unpickling
                    why = "it is not an .npy file of numbers: write it with numpy.save"
                raise DataError(
                    f"own data npy:{path}: {file.name} cannot be read: {why}"
                ) from error
    return values


def _call(rest: str, device: int | None) -> Mapping[str, Any]:
    function = plugins.find(rest, f"own data module:{rest}", DataError)
    values = function(device)
    if not isinstance(values, Mapping):
        raise DataError(
            f"own data module:{rest} must return a mapping with x_train and y_train, or x_test and "
            f"y_test, got {type(values).__name__}"
        )
    return values
