"""Partitions of a public data set among devices: iid, by class, by label shards, by size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array
from pipar_jax.config import DataConfig
from pipar_jax.errors import DataError

Indices = NDArray[np.intp]

#: Separates the draws of partitions from those of shuffles and augmentation.
_STREAM = 0x7061_7274


def partition(labels: Array, count: int, config: DataConfig, seed: int) -> list[Indices]:
    """Assigns every sample to one device, and at least one sample to each device.

    Args:
      labels: [samples] int.
      count: Number of devices.
      config: The partition and its parameters.
      seed: Root seed, equal on all hosts, so that each computes its own part.

    Returns:
      The positions of the samples of each device, in ascending order.

    Raises:
      DataError: There are not enough samples or label shards.
    """
    labels = np.asarray(labels)
    if len(labels) < count:
        raise DataError(
            f"{len(labels)} samples cannot be divided among {count} devices: lower devices.count "
            "or raise data.train_samples"
        )
    draw = np.random.default_rng(np.random.SeedSequence((seed, _STREAM)))
    parts = PARTITIONS[config.partition](labels, count, config, draw)
    return [np.sort(part).astype(np.intp) for part in _none_empty(parts)]


def partition_table(labels: Array, parts: list[Indices], classes: int) -> str:
    """Returns a table of the samples of each device, by class if there are few classes."""
    labels = np.asarray(labels)
    counts = np.stack([np.bincount(labels[part], minlength=classes) for part in parts])
    if classes <= 10:
        head = ["device", "samples", *(f"class {c}" for c in range(classes))]
        rows = [[f"d{i}", row.sum(), *row] for i, row in enumerate(counts)]
    else:
        head = ["device", "samples", "classes", "largest class"]
        rows = [
            [f"d{i}", row.sum(), np.count_nonzero(row), f"{row.max() / row.sum():.0%}"]
            for i, row in enumerate(counts)
        ]
    texts = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in texts
    )


def spread(total: int, wanted: int) -> Indices:
    """Returns ``wanted`` positions spread evenly over ``total``; all of them if 0 or too many.

    Deterministic, so that every seed and every host has the same samples.
    """
    if not 0 < wanted < total:
        return np.arange(total)
    return np.arange(wanted) * total // wanted


def _equally(
    labels: Array, count: int, config: DataConfig, draw: np.random.Generator
) -> list[Indices]:
    """A shuffle, cut into parts that differ by at most one sample."""
    del config
    return np.array_split(draw.permutation(len(labels)), count)


def _by_class(
    labels: Array, count: int, config: DataConfig, draw: np.random.Generator
) -> list[Indices]:
    """Each class is dealt by shares drawn from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335)."""
    dealt: list[list[Indices]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        of_class = draw.permutation(np.flatnonzero(labels == label))
        shares = _by_share(of_class, draw.dirichlet(np.full(count, config.alpha)))
        for mine, some in zip(dealt, shares, strict=True):
            mine.append(some)
    return [np.concatenate(mine) for mine in dealt]


def _by_shard(
    labels: Array, count: int, config: DataConfig, draw: np.random.Generator
) -> list[Indices]:
    """Sorted by label, cut into equal shards, and those dealt at random.

    McMahan et al., arXiv 1602.05629; a device gets ``shards_per_device`` of them.
    """
    shards = count * config.shards_per_device
    if len(labels) < shards:
        raise DataError(
            f"{len(labels)} samples cannot be cut into {count} devices x "
            f"{config.shards_per_device} label shards: lower data.shards_per_device"
        )
    # Shuffled before the stable sort, so that the samples of a label are assigned at random.
    shuffled = draw.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cut = np.array_split(by_label, shards)
    order = draw.permutation(shards).reshape(count, config.shards_per_device)
    return [np.concatenate([cut[shard] for shard in mine]) for mine in order]


def _by_quantity(
    labels: Array, count: int, config: DataConfig, draw: np.random.Generator
) -> list[Indices]:
    """A shuffle, cut by shares drawn from Dirichlet(alpha)."""
    shares = draw.dirichlet(np.full(count, config.alpha))
    return _by_share(draw.permutation(len(labels)), shares)


#: Every partition by name.
PARTITIONS: dict[str, Callable[[Array, int, DataConfig, np.random.Generator], list[Indices]]] = {
    "iid": _equally,
    "dirichlet": _by_class,
    "labels": _by_shard,
    "quantity": _by_quantity,
}


def _by_share(positions: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    bounds = np.rint(np.cumsum(shares)[:-1] * len(positions)).astype(int)
    return list(np.split(positions, bounds))


def _none_empty(parts: list[Indices]) -> list[Indices]:
    # A device without samples cannot participate: the largest one gives it a sample.
    for i, part in enumerate(parts):
        if not len(part):
            largest = max(range(len(parts)), key=lambda j: len(parts[j]))
            parts[i], parts[largest] = parts[largest][:1], parts[largest][1:]
    return parts
