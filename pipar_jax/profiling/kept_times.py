"""Measurements of a model on a host, and the files in which they are kept between runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

import pipar_jax
from pipar_jax.cost_model.profile import HostProfile, UnitFacts, host_from_dict, unit_from_dict
from pipar_jax.data.cache import user_cache
from pipar_jax.disk.files import make_folder, write_text
from pipar_jax.disk.json_text import JsonObject, dumps
from pipar_jax.errors import PlanError
from stages import Model

_FORMAT = 7


class Measured(NamedTuple):
    """Measurements of a model on a host.

    Attributes:
      host: Times, without emulated slowdown.
      units: Sizes of the units.
      seconds: Duration of the measurement; 0 if it was cached.
      alone_s: Seconds of the longest unit by itself, forward and backward at the largest size,
        by which cached times are confirmed; 0 for predicted times.
    """

    host: HostProfile
    units: tuple[UnitFacts, ...]
    seconds: float
    alone_s: float = 0.0

    def to_dict(self) -> JsonObject:
        """Returns values for JSON."""
        units = [dataclasses.asdict(unit) for unit in self.units]
        host = dataclasses.asdict(self.host)
        return {"host": host, "units": units, "seconds": self.seconds, "alone_s": self.alone_s}

    @classmethod
    def from_dict(cls, values: JsonObject) -> Measured:
        """Returns what ``to_dict`` wrote.

        Raises:
          PlanError: The values are not measurements.
        """
        try:
            units = tuple(unit_from_dict(unit) for unit in values["units"])
            seconds, alone_s = float(values["seconds"]), float(values["alone_s"])
            return cls(host_from_dict(values["host"]), units, seconds, alone_s)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"these are not a host's measurements: {error!r}") from error


def read_times(path: pathlib.Path) -> Measured | None:
    """Returns the measurements in a file; None if there are none, or they are damaged."""
    if not path.is_file():
        return None
    try:
        return Measured.from_dict(json.loads(path.read_text()))
    except (PlanError, json.JSONDecodeError):
        path.unlink(missing_ok=True)  # truncated or edited: measured and written again
        return None


def write_times(path: pathlib.Path, measured: Measured) -> None:
    """Writes a file atomically, since several hosts of a machine may write it at once."""
    remedy = "disable the cache with --config.tuner.cache=false"
    make_folder(path.parent, remedy)
    write_text(path, dumps(measured.to_dict()), remedy)


def path_of_times(
    model: Model, sizes: Sequence[int], settings: Mapping[str, JsonObject]
) -> pathlib.Path:
    """Returns the file of a model's times on this host, by all that they depend on.

    Args:
      model: The whole model.
      sizes: Micro-batch sizes.
      settings: Sections of the configuration that say what is computed.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    device = jax.devices()[0]
    about = {
        "format": _FORMAT,
        "versions": [pipar_jax.__version__, jax.__version__],
        "host": [platform.node(), platform.processor(), os.cpu_count(), cores],
        "device": [device.platform, device.device_kind],
        "model": [model.name, model.input_shape, model.classes, model.unit_names],
        "shapes": [str(shape) for shape in model.shapes(1)],
        "sizes": list(sizes),
        **settings,
    }
    mark = hashlib.sha256(dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / "profiles" / f"{model.name}-{mark}.json"
