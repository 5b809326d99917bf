"""Each host's own configuration: what all hosts of its kind share, and its overrides."""

from __future__ import annotations

import dataclasses

from pipar_jax.config.fields import CHAINS, Config, DeviceConfig, NodeConfig, ServerConfig
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import is_node, node_name


def device(config: Config, index: int) -> DeviceConfig:
    """Returns one device's complete configuration: defaults, its overrides, nothing left open.

    ``cut``, ``micro_batches`` and ``data_source`` are never None in it, and ``{device}`` in the
    source is replaced.

    Raises:
      ConfigError: There is no device of this index.
    """
    if not 0 <= index < config.devices.count:
        raise ConfigError(
            f"there is no device {index}: devices.count={config.devices.count}, so the last is "
            f"{config.devices.count - 1}"
        )
    made = dataclasses.replace(config.devices.defaults, **config.devices.overrides.get(index, {}))
    if made.cut is None:
        made.cut = config.pipeline.cut
    if made.micro_batches is None:
        made.micro_batches = config.pipeline.micro_batches
    source = config.data.source if made.data_source is None else made.data_source
    made.data_source = source.replace("{device}", str(index))
    return made


def node(config: Config, index: int) -> NodeConfig:
    """Returns one compute node's complete configuration: defaults and its overrides.

    Raises:
      ConfigError: There is no node of this index.
    """
    if not 1 <= index <= config.nodes.count:
        raise ConfigError(
            f"there is no node {index}: nodes.count={config.nodes.count}, and the first is 1"
        )
    return dataclasses.replace(config.nodes.defaults, **config.nodes.overrides.get(index, {}))


def nodes(config: Config) -> tuple[str, ...]:
    """Returns the names of the compute nodes that take part; none with methods that use none."""
    count = config.nodes.count if config.method in CHAINS else 0
    return tuple(node_name(index) for index in range(1, count + 1))


def host(config: Config, name: str) -> DeviceConfig | NodeConfig | ServerConfig:
    """Returns the configuration of the host of a name, such as ``d0``, ``n1`` or ``server``."""
    if name[:1] == "d":
        return device(config, int(name[1:]))
    return node(config, int(name[1:])) if is_node(name) else config.server


def host_field(name: str) -> str:
    """Returns the path of a host's fields, such as ``devices.0``."""
    if name[:1] == "d":
        return f"devices.{name[1:]}"
    return f"nodes.{name[1:]}" if is_node(name) else "server"
