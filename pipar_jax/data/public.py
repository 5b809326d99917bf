"""Public data sets without TensorFlow: digits, published files, and files prepared by TFDS."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from comms.arrays import Bytes
from comms.errors import explain
from pipar_jax.config import DataConfig
from pipar_jax.data.archives import find_originals, read_originals
from pipar_jax.data.cache import cache_folder, cached
from pipar_jax.data.download import fetch
from pipar_jax.data.published import DIGITS, SETS
from pipar_jax.data.types import Dataset, Examples
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.locks import locked
from pipar_jax.errors import DataError

_READ_AT_ONCE = 1000


def load_public(source: str, config: DataConfig) -> Dataset:
    """Returns a complete public data set, memory-mapped from decoded files.

    Sources are, in this order: files prepared by TFDS, published files in ``data_dir`` or the
    cache, and a download. Samples and order are the same.

    Args:
      source: A name in ``published.PUBLIC_SOURCES``.
      config: Folders of data and of decoded arrays, and whether to download.

    Raises:
      DataError: The set is missing and cannot be downloaded, or its files cannot be read.
    """
    folder = cache_folder(config.cache_dir)
    if source == DIGITS:
        return cached(folder, "digits-1", _decode_digits)
    home = pathlib.Path(
        config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    )
    home = home.expanduser().absolute()
    if config.data_dir and home.exists() and not home.is_dir():
        raise DataError(f"data.data_dir={config.data_dir!r} is not a folder: give its folder")
    about = find_prepared(source, home)
    if about is not None:
        key = f"{source}-{about.parent.name}-{_mark([about])}"
        return cached(folder, key, lambda: _decode(source, home))
    fetched = home if config.data_dir else folder / "published"
    paths = find_originals(source, [home, home / source, fetched])
    if not paths:
        paths = _fetch(source, home, fetched, config)
    key = f"{source}-published-{_mark(paths)}"
    return cached(folder, key, lambda: _dataset(source, read_originals(source, paths)))


def _mark(paths: Sequence[pathlib.Path]) -> str:
    """Returns a key for files, so that other files of a set have another entry in the cache."""
    marks = [(path, path.stat()) for path in paths]
    text = " ".join(f"{path} {stat.st_mtime_ns} {stat.st_size}" for path, stat in marks)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fetch(
    source: str, home: pathlib.Path, folder: pathlib.Path, config: DataConfig
) -> tuple[pathlib.Path, ...]:
    """Downloads the published files of a set into a folder and returns the files to read.

    Raises:
      DataError: A download failed; the message says which files to put where.
    """
    one = SETS[source]
    names = ", ".join(file.name for file in one.files)
    lacking = (
        f"data set {source!r} was not found in {home}, neither prepared by TFDS nor as {names}"
    )
    if one.not_read and any((place / one.not_read).exists() for place in (home, home / source)):
        lacking += f"; {one.not_read} is a pickle, which is never read"
    remedy = (
        f"download {names} from {one.files[0].url.rpartition('/')[0]}/ and name its folder "
        "(data.data_dir)"
    )
    if not config.download:
        raise DataError(f"{lacking}, and data.download=false: {remedy}")
    try:
        with locked(cache_folder(config.cache_dir) / f"{source}.lock"):
            for file in one.files:
                fetch(file, folder)
    except (DataError, OSError) as error:
        why = explain(error) if isinstance(error, OSError) else error
        raise DataError(f"{lacking}, and {why}; {remedy}") from error
    return find_originals(source, [folder])


def find_prepared(source: str, home: pathlib.Path) -> pathlib.Path | None:
    """Returns the ``dataset_info.json`` of the newest readable prepared version."""
    found = [
        path
        for path in sorted(home.glob(f"{source}/*/dataset_info.json"))
        if any(path.parent.glob("*.array_record*"))
    ]
    return max(found, key=lambda path: _version(path.parent.name), default=None)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in name.split("."))


def _decode(source: str, home: pathlib.Path) -> Dataset:
    import tensorflow_datasets as tfds

    # Its advice to install OpenCV does not apply: images are decoded once, not in every epoch.
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.ERROR)
    try:
        splits = [
            read_records(tfds.data_source(source, split=part, data_dir=str(home), download=False))
            for part in ("train", "test")
        ]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data set {source!r} in {home} cannot be read: {describe_reading(error)}; "
            "prepare it again"
        ) from error
    finally:
        absl.setLevel(level)
    return _dataset(source, (splits[0], splits[1]))


def _dataset(source: str, splits: tuple[Examples, Examples]) -> Dataset:
    one = SETS[source]
    return Dataset(
        source=source,
        train=splits[0],
        test=splits[1],
        classes=one.classes,
        mean=np.asarray(one.mean, np.float32) * np.float32(255),
        std=np.asarray(one.std, np.float32) * np.float32(255),
    )


def read_records(records: Any) -> Examples:
    """Returns the decoded images and labels of a TFDS data source.

    Args:
      records: A sequence of mappings with ``image`` [height, width, channels] uint8 and ``label``;
        ``__getitems__``, if available, is used to read many at a time.
    """
    total = len(records)
    labels = np.empty(total, np.int32)
    images: Bytes | None = None
    for first, some in _in_runs(records, total):
        if images is None:
            images = np.empty((total, *some[0]["image"].shape), np.uint8)
        for offset, record in enumerate(some):
            images[first + offset] = record["image"]
            labels[first + offset] = record["label"]
    if images is None:
        raise DataError("a split of the data set has no sample: prepare it again")
    return Examples.of(images, labels)


def _in_runs(records: Any, total: int) -> Iterator[tuple[int, Sequence[Any]]]:
    for first in range(0, total, _READ_AT_ONCE):
        run = range(first, min(first + _READ_AT_ONCE, total))
        if hasattr(records, "__getitems__"):
            yield first, records.__getitems__(list(run))
        else:
            yield first, [records[i] for i in run]


def _decode_digits() -> Dataset:
    """Returns the 1,797 handwritten digits of scikit-learn, one fifth as the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # The file is ordered by writer; a fixed shuffle distributes writers over both parts.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset(
        source="digits",
        train=Examples.of(images[train], labels[train]),
        test=Examples.of(images[test], labels[test]),
        classes=10,
        mean=np.asarray([images[train].mean()], np.float32),
        std=np.asarray([images[train].std()], np.float32),
    )
