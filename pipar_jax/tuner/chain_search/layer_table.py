"""Profile tables: costs of each layer of a model on each device."""

from __future__ import annotations

import csv
from pathlib import Path

from pipar_jax.disk.files import describe_reading
from pipar_jax.errors import DataError
from pipar_jax.tuner.chain_search.problem import Layer

#: Unit of sizes in tables.
KIB = 1024.0


def read_profile(path: Path, device: str) -> tuple[Layer, ...]:
    """Reads one device's layers from a profile table.

    The columns are device, layer, forward_ms, backward_ms, update_ms, activation_kb and weight_kb.
    A time of zero is a missing measurement and counts as zero.

    Args:
      path: The table, a CSV file.
      device: Device whose rows are read.

    Raises:
      DataError: The file is not a profile table, or lacks the device or a layer.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        mine = {int(row["layer"]): row for row in rows if row["device"] == device}
        layers = tuple(
            Layer(
                float(row["forward_ms"]) / 1e3,
                (float(row["backward_ms"]) + float(row["update_ms"])) / 1e3,
                float(row["activation_kb"]) * KIB,
                float(row["weight_kb"]) * KIB,
            )
            for _, row in sorted(mine.items())
        )
        known = sorted({row["device"] for row in rows})
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a profile table: {describe_reading(error)}; expected columns device, "
            "layer, forward_ms, backward_ms, update_ms, activation_kb, weight_kb"
        ) from error
    if not rows:
        raise DataError(f"{path} is not a profile table: it has no row")
    if not layers:
        raise DataError(f"{path} has no device {device!r}: it has {', '.join(known)}")
    if sorted(mine) != list(range(len(mine))):
        raise DataError(
            f"{path}: the layers of device {device!r} are {sorted(mine)}; they must be numbered "
            "from 0 without a gap"
        )
    return layers
