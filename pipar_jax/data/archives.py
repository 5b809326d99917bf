"""Reads public data sets from their published files, without TensorFlow and without unpickling.

CIFAR-10 and CIFAR-100 are tar archives of fixed-size records, MNIST is idx files, SVHN is MATLAB
files. Nothing is extracted to disk.

Members that are larger than the data set, lead out of the archive or are inconsistent are rejected
before they take memory. Samples are in the order of TFDS (shuffled by the MD5 sum of their number),
so that a run does not depend on the source of its data.
"""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from comms.errors import explain
from pipar_jax.data.matlab import read_matlab
from pipar_jax.data.published import SETS, Published
from pipar_jax.data.types import Examples
from pipar_jax.errors import DataError

Samples = tuple[NDArray[np.uint8], NDArray[np.int32]]

_PIXELS = 32 * 32 * 3
#: Bytes of an archive in addition to the samples: names of classes, a page of text, headers.
_BESIDE_BYTES = 1 << 20


def find_originals(source: str, folders: Sequence[pathlib.Path]) -> tuple[pathlib.Path, ...]:
    """Returns the published files of a set in the first folder with all of them, or none.

    Args:
      source: A name in ``published.SETS``.
      folders: Folders that may contain the archive (packed or .tar), or the files in it.
    """
    one = SETS[source]
    for folder in folders:
        if one.folder:
            name = one.files[0].name
            for packed in (folder / name, folder / name.removesuffix(".gz")):
                if packed.is_file():
                    return (packed,)
        for place in (folder / one.folder, folder):
            found = [_find_file(place, name) for name in (*one.train, *one.test)]
            if all(found):
                return tuple(path for path in found if path)
    return ()


def _find_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns a file, packed or not; files of MNIST may have a dot in their names."""
    known = (name, name.replace("-idx", ".idx"))
    paths = (folder / f"{one}{end}" for one in known for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def read_originals(source: str, paths: Sequence[pathlib.Path]) -> tuple[Examples, Examples]:
    """Returns the training and test split of a set, in TFDS's order.

    Args:
      source: A name in ``published.SETS``.
      paths: Files found by ``find_originals``.

    Raises:
      DataError: A file cannot be read, is truncated, or has unexpected contents.
    """
    one = SETS[source]
    with _reading(source, paths):
        if source == "mnist":
            train, train_labels, test, test_labels = paths
            found = [
                _read_idx(train, train_labels, one.most[0]),
                _read_idx(test, test_labels, one.most[1]),
            ]
        elif one.folder:
            found = _read_cifar(one, paths)
        else:
            found = [read_matlab(path, most) for path, most in zip(paths, one.most, strict=True)]
        for name, (images, labels) in zip(("training", "test"), found, strict=True):
            if not len(images):
                raise DataError(f"{_names(paths)}: there is no {name} sample")
            if int(labels.max()) >= one.classes:
                raise DataError(
                    f"{_names(paths)}: a {name} label is {int(labels.max())}, but {source} has "
                    f"classes 0 to {one.classes - 1}"
                )
    return _shuffled(found[0], "train"), _shuffled(found[1], "test")


def _shuffled(samples: Samples, part: str) -> Examples:
    images, labels = samples
    order = shuffle(len(labels), part)
    return Examples.of(images[order], labels[order])


def shuffle(samples: int, part: str) -> NDArray[np.intp]:
    """Returns the published positions of a split's samples, in the order of TFDS.

    TFDS sorts samples by the MD5 sum of the split's name and the sample's number.

    Args:
      samples: Number of samples.
      part: ``train`` or ``test``.
    """
    salted = hashlib.md5(part.encode(), usedforsecurity=False)

    def key(number: int) -> bytes:
        one = salted.copy()
        one.update(str(number).encode())
        return one.digest()

    return np.asarray(sorted(range(samples), key=key), np.intp)


@contextmanager
def _reading(source: str, paths: Sequence[pathlib.Path]) -> Iterator[None]:
    """Turns errors of readers into one line that names the files."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        why = explain(error) if isinstance(error, OSError) else str(error)
        raise DataError(
            f"data set {source!r} in {_names(paths)} cannot be read: {why}: download it again"
        ) from error


def _names(paths: Sequence[pathlib.Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent}"


# --- CIFAR: a tar archive of records, a label or two and 3,072 pixels each ------------------------


def _read_cifar(one: Published, paths: Sequence[pathlib.Path]) -> list[Samples]:
    labels = 2 if one.classes == 100 else 1  # CIFAR-100 has a coarse label before the fine one
    limits = dict.fromkeys(one.train, one.most[0]) | dict.fromkeys(one.test, one.most[1])
    limits = {name: samples * (labels + _PIXELS) for name, samples in limits.items()}
    if len(paths) == 1:
        held = _read_tar(paths[0], one.folder, limits)
    else:
        held = {}
        for (name, limit), path in zip(limits.items(), paths, strict=True):
            with _unpacked(path) as file:
                held[name] = _read_at_most(file, limit, path)
    if len(one.train) > 1 and len({len(held[name]) for name in limits}) > 1:
        raise DataError(
            f"{_names(paths)}: expected files of equal size, got "
            f"{', '.join(f'{name} of {len(held[name])}' for name in limits)} bytes: download it "
            "again"
        )
    made = []
    for names in (one.train, one.test):
        parts = [_records(held.pop(name), labels, name, paths) for name in names]
        images, numbers = (np.concatenate(some) for some in zip(*parts, strict=True))
        made.append((images, numbers))
    return made


def _records(data: bytes, labels: int, name: str, paths: Sequence[pathlib.Path]) -> Samples:
    size = labels + _PIXELS
    if len(data) % size:
        raise DataError(
            f"{_names(paths)}: {name} has {len(data)} bytes, expected a multiple of {size}: it is "
            "truncated or has another format; download the binary version again"
        )
    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    images = table[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, table[:, labels - 1].astype(np.int32)


def _read_tar(path: pathlib.Path, folder: str, limits: dict[str, int]) -> dict[str, bytes]:
    """Returns the contents of files in an archive by name, without extracting them to disk."""
    held: dict[str, bytes] = {}
    with _unpacked(path) as file:
        bounded: Any = _Bounded(file, sum(limits.values()) + _BESIDE_BYTES, path)
        for member, archive in _members(bounded):
            parts = pathlib.PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise DataError(
                    f"{path}: it contains {member.name!r}, which leads out of the archive"
                )
            name = parts[-1] if parts[:-1] in ((folder,), ()) and parts else ""
            if name not in limits:
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None or name in held:
                raise DataError(f"{path}: {member.name!r} is not a file, or occurs twice")
            held[name] = _read_at_most(content, limits[name], path)
        bounded.drain()  # gzip's checksum is at the end
    missing = [name for name in limits if name not in held]
    if missing:
        raise DataError(f"{path} has no {folder}/{missing[0]}: it is another archive, or truncated")
    return held


def _members(file: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            yield member, archive


class _Bounded:
    """A stream for tarfile that limits the total size, and the size of each read."""

    def __init__(self, file: IO[bytes], limit: int, path: pathlib.Path) -> None:
        self._file, self._limit, self._path = file, limit, path

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._limit:
            self._refuse()
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position > self._limit:
            self._refuse()
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def drain(self) -> None:
        """Reads up to the end."""
        while self._file.read(_BESIDE_BYTES):
            if self.tell() > self._limit:
                self._refuse()

    def _refuse(self) -> None:
        raise DataError(
            f"{self._path} would unpack to more than the {self._limit} bytes that the set has: it "
            "is another archive, or was tampered with"
        )


# --- MNIST: idx files, a header of sizes and then bytes -------------------------------------------


def _read_idx(images: pathlib.Path, labels: pathlib.Path, most: int) -> Samples:
    pixels, numbers = _read_bytes(images, 3, most), _read_bytes(labels, 1, most)
    if pixels.shape[1:] != (28, 28) or len(pixels) != len(numbers):
        raise DataError(
            f"{images} holds {pixels.shape} and {labels} {numbers.shape}, expected as many labels "
            "as images of 28 x 28"
        )
    return pixels[..., None], numbers.astype(np.int32)


def _read_bytes(path: pathlib.Path, rank: int, most: int) -> NDArray[np.uint8]:
    """Returns the array in an idx file of bytes, packed or not."""
    with _unpacked(path) as file:
        header = file.read(4 + 4 * rank)
        if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
            raise DataError(
                f"{path} is not an idx file of bytes with {rank} dimensions: it begins with "
                f"{header[:4].hex(' ')}"
            )
        shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
        if shape[0] > most or any(size > 28 for size in shape[1:]):
            raise DataError(f"{path} declares the shape {shape}, more than the set has ({most})")
        size = int(np.prod(shape))
        data = _read_at_most(file, size, path)
        if len(data) != size:
            raise DataError(
                f"{path} is truncated: {len(data)} of {size} bytes after the header; download it "
                "again"
            )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _unpacked(path: pathlib.Path) -> Any:
    """Opens a file, and decompresses it if it is gzipped."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def _read_at_most(file: IO[bytes], limit: int, path: pathlib.Path) -> bytes:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{path} contains more than the expected {limit} bytes: it is another file")
    return data
