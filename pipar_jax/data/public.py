"""Public data sets: scikit-learn's digits, and what TFDS prepared, read without TensorFlow."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipar_jax.data.cache import cache_folder, cached
from pipar_jax.data.types import Dataset, Split
from pipar_jax.errors import DataError

#: Classes, and mean and standard deviation per channel of the training images scaled to [0, 1].
_TFDS: dict[str, tuple[int, tuple[float, ...], tuple[float, ...]]] = {
    "mnist": (10, (0.1307,), (0.3081,)),
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn_cropped": (10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
_READ_AT_ONCE = 1000


def load_public(source: str, data_dir: str, cache_dir: str) -> Dataset:
    """Returns a public data set, whole, memory-mapped from the decoded files.

    Args:
      source: ``digits`` or a TFDS name of ``pipar_jax.config.PUBLIC_SOURCES``.
      data_dir: Folder of prepared TFDS data sets; empty for TFDS's own default.
      cache_dir: Folder for decoded arrays; empty for the user's cache folder.

    Raises:
      DataError: The set is not prepared and cannot be here, or its files cannot be read.
    """
    folder = cache_folder(cache_dir)
    if source == "digits":
        return cached(folder, "digits-1", _decode_digits)
    home = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    home = home.expanduser().absolute()
    about = find_prepared(source, home)
    if about is None:
        _prepare(source, home)
        about = find_prepared(source, home)
        if about is None:
            raise DataError(f"TFDS prepared {source!r}, but left nothing readable in {home}")
    # Another place or another preparation of the set is another entry of the cache.
    stat = about.stat()
    mark = hashlib.sha256(f"{about} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:12]
    return cached(folder, f"{source}-{about.parent.name}-{mark}", lambda: _decode(source, home))


def find_prepared(source: str, home: pathlib.Path) -> pathlib.Path | None:
    """Returns the ``dataset_info.json`` of the newest prepared version that can be read here."""
    found = [
        path
        for path in sorted(home.glob(f"{source}/*/dataset_info.json"))
        if any(path.parent.glob("*.array_record*"))
    ]
    return max(found, key=lambda path: _version(path.parent.name), default=None)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in name.split("."))


def _prepare(source: str, home: pathlib.Path) -> None:
    """Downloads and prepares a set as TFDS does, which takes TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"data set {source!r} is not prepared in {home} (as array_record), and preparing needs "
            "TensorFlow: install the `tf` extra (pip install 'pipar-jax[tf]') and run this again, "
            f"or run `tfds build {source} --file_format=array_record --data_dir={home}` where "
            "TensorFlow is and copy the folder, or give its place with --config.data.data_dir"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(source, data_dir=str(home), file_format="array_record")
    try:
        builder.download_and_prepare()
    except (OSError, tfds.core.download.DownloadError) as error:
        raise DataError(f"data set {source!r} could not be prepared in {home}: {error}") from error


def _decode(source: str, home: pathlib.Path) -> Dataset:
    import tensorflow_datasets as tfds

    # Its advice to install OpenCV concerns whoever decodes in every epoch; here it happens once.
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.ERROR)
    try:
        splits = [
            read_records(tfds.data_source(source, split=part, data_dir=str(home), download=False))
            for part in ("train", "test")
        ]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data set {source!r} in {home} cannot be read: {error}; prepare it again"
        ) from error
    finally:
        absl.setLevel(level)
    classes, mean, std = _TFDS[source]
    height, width, channels = splits[0].images.shape[1:]
    return Dataset(
        source=source,
        train=splits[0],
        test=splits[1],
        classes=classes,
        input_shape=(height, width, channels),
        mean=np.asarray(mean, np.float32) * np.float32(255),
        std=np.asarray(std, np.float32) * np.float32(255),
    )


def read_records(records: Any) -> Split:
    """Returns the decoded images and labels of a TFDS data source.

    Args:
      records: A sequence of mappings with ``image`` [height, width, channels] uint8 and ``label``;
        ``__getitems__`` is used to read many at a time where there is one.
    """
    total = len(records)
    labels = np.empty(total, np.int32)
    images: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    for first, some in _in_runs(records, total):
        if images is None:
            images = np.empty((total, *some[0]["image"].shape), np.uint8)
        for offset, record in enumerate(some):
            images[first + offset] = record["image"]
            labels[first + offset] = record["label"]
    if images is None:
        raise DataError("a split of the data set holds no sample: prepare it again")
    return Split(images, labels)


def _in_runs(records: Any, total: int) -> Iterator[tuple[int, Sequence[Any]]]:
    for first in range(0, total, _READ_AT_ONCE):
        run = range(first, min(first + _READ_AT_ONCE, total))
        if hasattr(records, "__getitems__"):
            yield first, records.__getitems__(list(run))
        else:
            yield first, [records[i] for i in run]


def _decode_digits() -> Dataset:
    """Returns the 1,797 handwritten digits that come with scikit-learn, a fifth as the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Writers follow one another in the file; a fixed shuffle puts all of them in both parts.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset(
        source="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=10,
        input_shape=(8, 8, 1),
        mean=np.asarray([images[train].mean()], np.float32),
        std=np.asarray([images[train].std()], np.float32),
    )
