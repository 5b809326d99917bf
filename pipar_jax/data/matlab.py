"""SVHN's cropped images, as MATLAB files (version 5) read by scipy."""

from __future__ import annotations

import pathlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipar_jax.disk.files import describe_reading
from pipar_jax.errors import DataError

#: Height, width and channels of an image.
SHAPE = (32, 32, 3)
_HEADER_BYTES, _TAG_BYTES = 128, 8
_COMPRESSED = 15
_AT_ONCE = 1 << 20
#: Bytes of variables in addition to pixels and labels: names, sizes, tags.
_BESIDE_BYTES = 1 << 16


def read_matlab(path: pathlib.Path, most: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Returns [samples, 32, 32, 3] images and [samples] labels; the label 10 of the file is 0.

    Args:
      path: The file.
      most: Maximum number of samples.

    Raises:
      DataError: It is not such a file, is truncated, or has unexpected contents.
    """
    _check_size(path, most * (int(np.prod(SHAPE)) + 8) + _BESIDE_BYTES)
    from scipy.io import loadmat

    try:
        values = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # scipy raises almost any error for a malformed file
        raise DataError(
            f"{path} cannot be read as a MATLAB file: {describe_reading(error)}: download it again"
        ) from error
    images, labels = (np.asarray(values.get(name)) for name in ("X", "y"))
    labels = labels.reshape(-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != SHAPE:
        raise DataError(
            f"{path}: X must be [32, 32, 3, samples] uint8, got {images.shape} {images.dtype}: get "
            "the cropped digits"
        )
    count = images.shape[3]
    if labels.dtype.kind not in "iuf" or len(labels) != count or count > most:
        raise DataError(
            f"{path}: y must be a label for each of {count} images (at most {most}), got "
            f"{labels.shape} {labels.dtype}"
        )
    if count and not np.isin(labels, np.arange(11)).all():
        raise DataError(f"{path}: y must be whole numbers from 1 to 10 (0), got others")
    return np.moveaxis(images, 3, 0), (labels % 10).astype(np.int32)


def _check_size(path: pathlib.Path, limit: int) -> None:
    """Rejects a file whose variables would take more memory than the set, before reading them."""
    total, left = 0, path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        orders: dict[bytes, Any] = {b"IM": "little", b"MI": "big"}
        order = orders.get(header[126:128])
        if order is None or int.from_bytes(header[124:126], order) != 0x0100:
            raise DataError(f"{path} is not a MATLAB file of version 5, the format of SVHN")
        left -= _HEADER_BYTES
        while left > 0:
            tag = file.read(_TAG_BYTES)
            nbytes = int.from_bytes(tag[4:8], order)
            left -= _TAG_BYTES + nbytes
            if len(tag) < _TAG_BYTES or left < 0:
                raise DataError(f"{path} is truncated: a variable of {nbytes} bytes is incomplete")
            if int.from_bytes(tag[:4], order) == _COMPRESSED:
                total += _unpacked_bytes(file.read(nbytes), limit - total)
            else:
                total += nbytes
                file.seek(nbytes, 1)
            if total > limit:
                raise DataError(
                    f"{path} would unpack to more than the {limit} bytes that the set has: it is "
                    "another file, or was tampered with"
                )


def _unpacked_bytes(packed: bytes, limit: int) -> int:
    """Returns the decompressed size of data, in bounded memory; stops beyond ``limit``.

    Corrupt data are reported by the reader later.
    """
    unpacking, total = zlib.decompressobj(), 0
    try:
        while packed and not unpacking.eof and total <= limit:
            total += len(unpacking.decompress(packed, _AT_ONCE))
            packed = unpacking.unconsumed_tail
    except zlib.error:
        return total
    return total
