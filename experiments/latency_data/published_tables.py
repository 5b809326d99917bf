"""Published profile tables as further devices: the operators of their rows, and their times.

Tables contain only sizes and times; the operators of each row are defined here, for the two
networks that the tables of MP-SL (Tirana, Lalis and Chatzopoulos, arXiv 2402.00208) describe. A
time of zero is a missing measurement.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.latency_data.timings import (
    SHIPPED_TIMINGS,
    TimedDevice,
    TimedLayer,
    Timings,
    layer,
)
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.operators import Operator, convolution
from pipar_jax.tuner.chain_search import read_profile

#: Batch size of the tables.
BATCH = 128
#: Family of devices known from tables alone.
FAMILY = "table"
#: Tables and devices whose first so many rows have the backwards of their layers in the order in
#: which they ran, from the last to the first: as they stand they have nothing to do with those of
#: other devices (correlation of logarithms with the VM's -0.17 and -0.13), reversed they agree with
#: them (0.98 and 0.85), pools with pools.
REVERSED = {("vgg19_cifar.csv", "jetson-cpu"): 22, ("vgg19_cifar.csv", "jetson-gpu"): 22}


def read_tables(folder: Path) -> Timings | None:
    """Returns all devices of the tables in a folder.

    Args:
      folder: Folder of files named as in ``TABLES``; missing ones are skipped.

    Returns:
      The times; None if there is no table.

    Raises:
      DataError: A table cannot be read, or has unknown rows.
    """
    found: Timings | None = None
    for name, make in TABLES.items():
        path = folder / name
        if not os.path.isfile(path):
            continue
        layers = tuple(make())
        with path.open(newline="", encoding="utf-8") as file:
            devices = list(dict.fromkeys(row["device"] for row in csv.DictReader(file)))
        forward, backward = (np.full((len(devices), len(layers)), np.nan) for _ in range(2))
        for row, device in enumerate(devices):
            read = read_profile(path, device)
            if len(read) < len(layers):
                raise DataError(
                    f"{path}: device {device!r} has {len(read)} layers, expected {len(layers)}"
                )
            read = read[: len(layers)]  # one device's table goes on with the loss
            # Its backward counts the update, which is small but for the dense layers.
            forward[row] = [one.forward_s or np.nan for one in read]
            backward[row] = [one.backward_s or np.nan for one in read]
            rows = REVERSED.get((name, device), 0)
            backward[row, :rows] = backward[row, :rows][::-1]
        made = Timings(
            tuple(TimedDevice(f"{FAMILY}-{name}", FAMILY) for name in devices), layers,
            forward, backward,
        )  # fmt: skip
        found = made if found is None else found.join(made)
    return found


def read_timings(path: Path | None = None, tables: Path | None = None) -> Timings:
    """Returns gathered times, together with those of profile tables.

    Args:
      path: What ``experiments.collect_latency`` wrote; None is what is kept here.
      tables: A folder of profile tables; None is none.

    Raises:
      DataError: A file cannot be read, or there is no table in the folder.
    """
    timings = Timings.load(path or SHIPPED_TIMINGS)
    if tables is None:
        return timings
    found = read_tables(tables)
    if found is None:
        raise DataError(f"{tables} contains none of {', '.join(TABLES)}")
    return timings.join(found)


def _norm(side: int, channels: int) -> tuple[Operator, ...]:
    """Returns batch normalisation and ReLU, as eager frameworks run them."""
    nbytes = 4.0 * BATCH * side * side * channels
    count = nbytes / 4
    return (
        Operator("elementwise", 6 * count, 0.0, 6 * nbytes, 6 * nbytes, BATCH, repeats=6),
        Operator("reduce", 2.0 * channels, 0.0, 2 * nbytes, 8.0 * channels, BATCH, repeats=2),
    )


def _pool(side: int, channels: int, window: int, stride: int) -> tuple[Operator, ...]:
    out = 4.0 * BATCH * side * side * channels
    return (
        Operator("pool", out / 4 * window**2, 0.0, out * stride**2, out, BATCH, window, stride,
                 channels, channels, side * side),
    )  # fmt: skip


def _dense(inputs: int, outputs: int) -> tuple[Operator, ...]:
    return (
        Operator("matmul", 2.0 * BATCH * inputs * outputs, 4.0 * inputs * outputs,
                 4.0 * BATCH * inputs, 4.0 * BATCH * outputs, BATCH, 1, 1, inputs, outputs, 1),
    )  # fmt: skip


def _numbered(network: str, parts: Iterable[tuple[Operator, ...]]) -> list[TimedLayer]:
    call = Operator("call")
    return [layer(network, i, BATCH, (call, *part)) for i, part in enumerate(parts)]


def _resnet101() -> list[TimedLayer]:
    """Returns its rows: stem, pool, 33 blocks of two 3x3 convolutions, pool, dense."""

    def block(side: int, channels: int) -> tuple[Operator, ...]:
        once = convolution(BATCH, side, channels, channels, 3) + _norm(side, channels)
        return once + once

    parts = [
        convolution(BATCH, 16, 3, 64, 7, 2, pulled=False) + _norm(16, 64), _pool(8, 64, 3, 2),
    ]  # fmt: skip
    # By their weights the first blocks of a width have two convolutions of that width as well.
    for side, channels, count in ((8, 64, 3), (4, 128, 4), (2, 256, 23), (1, 512, 3)):
        parts += [block(side, channels)] * count
    parts += [_pool(1, 512, 1, 1), _dense(512, 10)]
    return _numbered("table-resnet101", parts)


def _vgg19() -> list[TimedLayer]:
    """Returns its rows: convolutions with normalisation, padded pools, three dense layers."""
    parts: list[tuple[Operator, ...]] = []
    channels = 3
    for side, outputs, count in ((32, 64, 2), (17, 128, 2), (9, 256, 4), (5, 512, 4), (3, 512, 4)):
        for _ in range(count):
            made = convolution(BATCH, side, channels, outputs, 3, pulled=bool(parts))
            parts.append(made + _norm(side, outputs))
            channels = outputs
        after = {32: 17, 17: 9, 9: 5, 5: 3, 3: 2}[side]
        parts.append(_pool(after, outputs, 2, 2))
    parts.append(_pool(7, 512, 1, 1))
    parts += [_dense(25088, 4096), _dense(4096, 4096), _dense(4096, 10)]
    return _numbered("table-vgg19", parts)


TABLES = {"resnet101_cifar.csv": _resnet101, "vgg19_cifar.csv": _vgg19}
