"""The data set: times of layers on devices, as one value and one file."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from comms.errors import explain
from pipar_jax.disk.files import replacing
from pipar_jax.disk.json_text import dumps
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.operators import WIDTH, Array, Operator, rows

#: The times that the network of the package was trained on, without tables.
SHIPPED_TIMINGS = Path(__file__).with_name("timings.npz")
#: The network of the reference layers.
REFERENCE = "reference"


class TimedLayer(NamedTuple):
    """A timed layer.

    Attributes:
      network: Its network.
      unit: Its position in the network.
      batch: Samples.
      operators: Its operators, as of ``operators.rows``, [operators, WIDTH].
    """

    network: str
    unit: int
    batch: int
    operators: Array


class TimedDevice(NamedTuple):
    """A timed device.

    Attributes:
      name: Its name.
      family: Family of similar devices, which are held out together.
    """

    name: str
    family: str


@dataclasses.dataclass(frozen=True)
class Timings:
    """Times of layers on devices.

    Attributes:
      devices: The devices.
      layers: The layers.
      forward_s: Seconds of forwards [devices, layers] float64; NaN where not measured.
      backward_s: The same of backwards.
    """

    devices: tuple[TimedDevice, ...]
    layers: tuple[TimedLayer, ...]
    forward_s: Array
    backward_s: Array

    def reference(self) -> list[int]:
        """Returns the columns of the reference layers."""
        return [i for i, one in enumerate(self.layers) if one.network == REFERENCE]

    def select(
        self, devices: Sequence[int] | None = None, layers: Sequence[int] | None = None
    ) -> Timings:
        """Returns the times of some devices and layers; None is all."""
        rows_of = list(range(len(self.devices))) if devices is None else list(devices)
        columns = list(range(len(self.layers))) if layers is None else list(layers)
        return Timings(
            tuple(self.devices[i] for i in rows_of),
            tuple(self.layers[i] for i in columns),
            self.forward_s[np.ix_(rows_of, columns)],
            self.backward_s[np.ix_(rows_of, columns)],
        )

    def join(self, other: Timings) -> Timings:
        """Returns the union of both; if both have a time of a device and layer, the other's."""
        devices = {one.name: one for one in (*self.devices, *other.devices)}
        layers = {one[:3]: one for one in (*self.layers, *other.layers)}
        rows_of = {name: i for i, name in enumerate(devices)}
        columns_of = {key: i for i, key in enumerate(layers)}
        tables = [np.full((len(devices), len(layers)), np.nan) for _ in range(2)]
        for part in (self, other):
            place = np.ix_(
                [rows_of[device.name] for device in part.devices],
                [columns_of[one[:3]] for one in part.layers],
            )
            for table, times in zip(tables, (part.forward_s, part.backward_s), strict=True):
                table[place] = np.where(np.isfinite(times), times, table[place])
        return Timings(tuple(devices.values()), tuple(layers.values()), tables[0], tables[1])

    def save(self, path: Path) -> None:
        """Writes an .npz file without pickles.

        Raises:
          DiskError: It cannot be written.
        """
        about = {
            "devices": [list(device) for device in self.devices],
            "layers": [list(one[:3]) for one in self.layers],
        }
        arrays = {
            "about": np.frombuffer(dumps(about).encode(), np.uint8),
            "forward_s": self.forward_s.astype(np.float32),
            "backward_s": self.backward_s.astype(np.float32),
            "operators": np.concatenate([one.operators for one in self.layers]).astype(np.float32),
            "counts": np.asarray([len(one.operators) for one in self.layers], np.int32),
        }
        with replacing(path, "choose another file with --out") as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Timings:
        """Reads a file of ``save``.

        Raises:
          DataError: The file cannot be read, or is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays["about"].tobytes())
            parts = np.split(
                arrays["operators"].astype(np.float64).reshape(-1, WIDTH),
                np.cumsum(arrays["counts"])[:-1],
            )
            layers = tuple(
                TimedLayer(str(network), int(index), int(batch), part)
                for (network, index, batch), part in zip(about["layers"], parts, strict=True)
            )
            devices = tuple(TimedDevice(*map(str, one)) for one in about["devices"])
            tables = [arrays[name].astype(np.float64) for name in ("forward_s", "backward_s")]
            if any(table.shape != (len(devices), len(layers)) for table in tables):
                raise ValueError("a table does not match its devices and layers")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {explain(error)}") from error
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} does not contain times of layers: {error}") from error
        return cls(devices, layers, tables[0], tables[1])


def layer(network: str, unit: int, batch: int, operators: Sequence[Operator]) -> TimedLayer:
    """Returns a layer of operators."""
    return TimedLayer(network, unit, batch, rows(operators))
