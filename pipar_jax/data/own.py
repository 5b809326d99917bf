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
from pipar_jax.config import plugins
from pipar_jax.data.admission import Part, as_array, assemble
from pipar_jax.data.types import Dataset
from pipar_jax.errors import DataError


def load_own(
    source: str, device: int | None, *, part: Part, classes: int = 0, scale: float = 0.0
) -> Dataset:
    """Returns the own data of a host.

    A file ``npz:PATH`` or the mapping that ``module:NAME:FUNCTION`` returns contains ``x_train``
    and ``y_train`` (on a device) or ``x_test`` and ``y_test`` (on the server), and optionally
    ``classes`` (else the highest label + 1), ``scale``, and ``mean`` and ``std`` per channel. The
    function is called with the device's index, or None on the server.

    The input of the network is ``(x / scale - mean) / std``. Without any of the three, floats are
    used unchanged; whole numbers are rejected, since their dtype does not tell whether they are
    pixels or codes: ``scale`` (or ``std``) is required.

    Args:
      source: ``npz:PATH`` or ``module:NAME:FUNCTION``.
      device: The device's index; None on the server.
      part: ``train`` or ``test``: the split that this host needs; the other stays empty.
      classes: Number of classes if configured, else 0. A device may lack the highest label, yet all
        hosts must build the same model.
      scale: Divisor of numbers if configured, else 0.

    Raises:
      DataError: The source cannot be read, or an array is missing or not valid.
    """
    kind, _, rest = source.partition(":")
    values = _read_npz(rest, part) if kind == "npz" else _call(rest, device)
    missing = [name for name in _names(part)[:2] if name not in values]
    if missing:
        raise DataError(
            f"{source!r} has no {' and no '.join(missing)}: a device needs x_train and y_train, "
            "the server x_test and y_test (or set data.test_source)"
        )
    images = as_array(values[f"x_{part}"], f"{source!r}: x_{part}")
    mean, std = _normalisation(values, scale, repr(source))
    made = assemble(
        source, part, images, values[f"y_{part}"],
        classes=classes or values.get("classes", 0), mean=mean, std=std, where=repr(source),
    )  # fmt: skip
    if images.dtype.kind in "iu" and not (scale or values.keys() & {"scale", "std"}):
        raise DataError(
            f"{source!r}: the images are {images.dtype}, and their scale is unknown: give `scale` "
            "with the arrays or set data.scale (255 for pixels, 1 to use them unchanged), or "
            "give `mean` and `std`"
        )
    return made


def _names(part: str) -> tuple[str, ...]:
    return (f"x_{part}", f"y_{part}", "classes", "scale", "mean", "std")


def _normalisation(values: Mapping[str, Any], scale: float, where: str) -> tuple[Any, Any]:
    """Returns the mean and standard deviation given by the data, in units of the stored images."""
    said = {name: _number(values[name], f"{where}: {name}") for name in _names("")[3:]
            if name in values}  # fmt: skip
    if scale and "scale" in said and (said["scale"] != scale).any():
        raise DataError(
            f"{where}: scale={said['scale'].tolist()} with the arrays contradicts data.scale="
            f"{scale:g}: omit one of them"
        )
    if scale:
        said["scale"] = np.asarray(scale)
    factor = said.get("scale", np.ones(()))
    if factor.size != 1 or not 0 < factor.item() < np.inf:
        raise DataError(f"{where}: scale must be one number above 0, got {factor.tolist()}")
    return said.get("mean", np.zeros(())) * factor, said.get("std", np.ones(())) * factor


def _number(value: object, what: str) -> Array:
    try:
        return np.asarray(value, np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} must be numbers, got {value!r}") from error


def _read_npz(path: str, part: str) -> dict[str, Any]:
    file = pathlib.Path(path).expanduser()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file} is not an .npz file: write it with numpy.savez")
            # Arrays are decompressed on access: skip those of the other part.
            return {name: arrays[name] for name in arrays.files if name in _names(part)}
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


def _call(rest: str, device: int | None) -> Mapping[str, Any]:
    function = plugins.find(rest, f"own data module:{rest}", DataError)
    values = function(device)
    if not isinstance(values, Mapping):
        raise DataError(
            f"own data module:{rest} must return a mapping with x_train and y_train, or x_test and "
            f"y_test, got {type(values).__name__}"
        )
    return values
