"""Who a device is when it joins, and whether the coordinator may take it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pipar_jax
from pipar_jax.config import Config, difference, from_json, to_json
from pipar_jax.data import Loader
from pipar_jax.errors import ConfigError
from stages import Model

#: Version of the control messages between coordinator and devices.
CONTROL_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a device says of itself.

    Attributes:
      index: Its index.
      samples: Samples that it trains on in an epoch.
      steps: Steps in its epoch.
    """

    index: int
    samples: int
    steps: int


def join_message(config: Config, index: int, loader: Loader, model: Model) -> dict[str, Any]:
    """Returns the first message of a device."""
    return {
        "type": "join",
        "control_version": CONTROL_VERSION,
        "version": pipar_jax.__version__,
        "index": index,
        "config": json.loads(to_json(config)),
        "samples": loader.samples_per_epoch,
        "steps": loader.steps_per_epoch,
        "input_shape": list(model.input_shape),
        "classes": model.classes,
        "units": describe(model),
    }


def describe(model: Model) -> dict[str, Any]:
    """Returns every unit's variables with shape and dtype, to compare models by."""
    return {
        unit.name: {
            path: f"{one.dtype}{list(one.shape)}"
            for path, one in sorted({**unit.params, **unit.state}.items())
        }
        for unit in model.units
    }


def objection(body: Mapping[str, Any], config: Config, model: Model) -> str | None:
    """Returns why a device that sent this message cannot take part, or None.

    Args:
      body: Its first message.
      config: The coordinator's configuration.
      model: The coordinator's model.
    """
    if body.get("type") != "join":
        return f"its first message is {body.get('type')!r}, expected 'join'"
    versions = body.get("control_version"), body.get("version")
    if versions[0] != CONTROL_VERSION:
        return (
            f"it runs version {versions[1]} (control messages {versions[0]}), the coordinator "
            f"{pipar_jax.__version__} ({CONTROL_VERSION}): install the same version on both"
        )
    index = body.get("index")
    if not isinstance(index, int) or not 0 <= index < config.devices.count:
        return (
            f"it says it is device {index}, but devices.count={config.devices.count}: start it "
            f"with an index from 0 to {config.devices.count - 1}"
        )
    try:
        differing = difference(config, from_json(json.dumps(body.get("config"))))
    except ConfigError as error:
        return f"its configuration cannot be read: {error}"
    if differing:
        return (
            f"its configuration differs from the coordinator's in {', '.join(differing)}: start "
            "both with the same preset and flags"
        )
    ours = describe(model)
    if body.get("units") != ours:
        theirs = body.get("units") or {}
        unit = next((u for u in [*ours, *theirs] if ours.get(u) != theirs.get(u)), "order")
        return (
            f"its model differs: unit {unit!r} is {ours.get(unit)} here and {theirs.get(unit)} "
            f"there (inputs {list(model.input_shape)} and {body.get('input_shape')}, classes "
            f"{model.classes} and {body.get('classes')})"
        )
    counts = body.get("samples"), body.get("steps")
    if not all(isinstance(n, int) and n > 0 for n in counts):
        return f"it has no data to train on: {counts[0]} samples, {counts[1]} steps"
    return None


def identity(body: Mapping[str, Any]) -> Identity:
    """Returns what an accepted device says of itself."""
    return Identity(body["index"], body["samples"], body["steps"])
