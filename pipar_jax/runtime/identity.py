"""Who a device or compute node is when it joins, and whether the coordinator may take it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pipar_jax
from pipar_jax import config as configuration
from pipar_jax.config import Config, difference, from_json, to_json
from pipar_jax.data import Loader
from pipar_jax.errors import ConfigError
from pipar_jax.plan import device_name, is_node
from stages import Model

#: Version of the control messages between coordinator and devices.
CONTROL_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a device or a compute node says of itself.

    Attributes:
      name: Its name, such as ``d0`` or ``n1``.
      samples: Samples that it trains on in an epoch; 0 for a node.
      steps: Steps in its epoch; 0 for a node.
      address: Host and port at which a node's neighbours reach it.
    """

    name: str
    samples: int = 0
    steps: int = 0
    address: tuple[str, int] | None = None

    @property
    def index(self) -> int:
        """Its index among the devices or nodes."""
        return int(self.name[1:])


def join_message(config: Config, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first message of a device or node.

    Args:
      config: Its configuration.
      name: Its name.
      facts: ``device_facts`` or ``node_facts``.
    """
    return {
        "type": "join",
        "control_version": CONTROL_VERSION,
        "version": pipar_jax.__version__,
        "name": name,
        "config": json.loads(to_json(config)),
        **facts,
    }


def device_facts(loader: Loader, model: Model) -> dict[str, Any]:
    """Returns what the coordinator has to know of a device."""
    return {
        "samples": loader.samples_per_epoch,
        "steps": loader.steps_per_epoch,
        "input_shape": list(model.input_shape),
        "classes": model.classes,
        "units": describe(model),
    }


def node_facts(address: tuple[str, int]) -> dict[str, Any]:
    """Returns what the coordinator has to know of a compute node."""
    return {"address": list(address)}


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
    """Returns why a host that sent this message cannot take part, or None.

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
    reason = _unknown_name(body.get("name"), config)
    if reason is not None:
        return reason
    try:
        differing = difference(config, from_json(json.dumps(body.get("config"))))
    except ConfigError as error:
        return f"its configuration cannot be read: {error}"
    if differing:
        return (
            f"its configuration differs from the coordinator's in {', '.join(differing)}: start "
            "both with the same preset and flags"
        )
    if is_node(body["name"]):
        return _odd_address(body.get("address"))
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


def _unknown_name(name: Any, config: Config) -> str | None:
    """Returns why a host of this name is not expected, or None."""
    devices = [device_name(i) for i in range(config.devices.count)]
    nodes = list(configuration.nodes(config))
    if name in devices or name in nodes:
        return None
    kind, known, field = "device", devices, f"devices.count={config.devices.count}"
    if isinstance(name, str) and is_node(name):
        kind, known, field = "node", nodes, f"nodes.count={config.nodes.count}"
    there = f"{known[0][1:]} to {known[-1][1:]}" if known else "there are none"
    return f"it says it is {name!r}, but {field}: start it with an index of a {kind} ({there})"


def _odd_address(address: Any) -> str | None:
    """Returns why a node could not be reached at an address, or None."""
    try:
        host, port = address
        if isinstance(host, str) and isinstance(port, int) and 0 < port < 65536:
            return None
    except (TypeError, ValueError):
        pass
    return f"it gives {address!r} as its address, expected host and port"


def identity(body: Mapping[str, Any]) -> Identity:
    """Returns what an accepted device or node says of itself."""
    if is_node(body["name"]):
        host, port = body["address"]
        return Identity(body["name"], address=(host, port))
    return Identity(body["name"], body["samples"], body["steps"])
