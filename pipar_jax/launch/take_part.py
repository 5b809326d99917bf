"""One host of a run in this process: server, device or compute node.

Nothing here loads jax before the host's environment is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipar_jax.config import Config
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.errors import ConfigError
from pipar_jax.launch import machine, process
from pipar_jax.launch.flags import parse_address
from pipar_jax.launch.run_folders import check_place, hold_folder
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import COORDINATOR, device_name, node_name

if TYPE_CHECKING:
    from pipar_jax.data import Dataset
    from pipar_jax.launch.finished_run import Run
    from stages import Model


def run_server(
    config: Config,
    model: Model | None = None,
    data: Dataset | None = None,
    *,
    on_event: OnEvent | None = None,
) -> Run:
    """Runs the server of a run whose devices are elsewhere, and returns the finished run.

    It listens at ``server.host`` and ``server.port``, waits for the devices, and trains. The event
    ``listening`` has the port that was taken where ``server.port`` is 0.

    Args:
      config: The configuration, the same on all hosts; it is resolved here.
      model: Your own model, if the configuration does not name it.
      data: The test set, if the configuration does not name it.
      on_event: Called with each event as it happens.

    Raises:
      ConfigError: The configuration is not valid, or this machine cannot run the server or have the
        run's folder.
      DataError: The test set cannot be read, is not valid, or does not fit the model.
      PiparError: The run failed.
    """
    resolved = prepare(config, COORDINATOR, model, reads_data=data is None)
    check_place(resolved)
    with hold_folder(resolved) as folder:
        from pipar_jax.launch.finished_run import load_configured
        from pipar_jax.roles import server  # loads jax, whose environment is set now

        tell = on_event or (lambda event: None)
        server.run_server(resolved, on_event=tell, model=model, data=data)
        return load_configured(resolved, folder.path, model)


def run_device(
    config: Config,
    index: int,
    server: str,
    model: Model | None = None,
    data: Dataset | None = None,
) -> None:
    """Takes part in a run as a device, until the server ends the run.

    Args:
      config: The configuration, the same on all hosts; it is resolved here.
      index: The device's index, counted from 0.
      server: The server's address, HOST:PORT. It may start later, within
        ``network.join_timeout_s``.
      model: Your own model, if the configuration does not name it.
      data: The device's data, if the configuration does not name them.

    Raises:
      ConfigError: The configuration, the index or the address is not valid, or this machine cannot
        run the device.
      DataError: The data cannot be read, are not valid, or do not fit the model.
      JoinError: The server cannot be reached or refuses this device.
      PiparError: The run failed.
    """
    address = parse_address(server, "server")
    check_device(config, index)
    resolved = prepare(config, device_name(index), model, reads_data=data is None)
    from pipar_jax.roles import participants  # loads jax, whose environment is set now

    participants.run_device(resolved, index, address, model=model, data=data)


def run_node(config: Config, index: int, server: str, model: Model | None = None) -> None:
    """Takes part in a run as a compute node, until the server ends the run.

    Args:
      config: The configuration, the same on all hosts; it is resolved here.
      index: The node's index, counted from 1.
      server: The server's address, HOST:PORT.
      model: Your own model, if the configuration does not name it.

    Raises:
      ConfigError: The configuration, the index or the address is not valid, or this machine cannot
        run the node.
      JoinError: The server or a neighbour cannot be reached or refuses this node.
      PiparError: The run failed.
    """
    address = parse_address(server, "server")
    nodes = config.nodes.count
    _check_index("index", index, range(1, nodes + 1), f"nodes.count={nodes}")
    resolved = prepare(config, node_name(index), model, reads_data=False)
    from pipar_jax.roles import participants  # loads jax, whose environment is set now

    participants.run_node(resolved, index, address, model=model)


def prepare(
    config: Config, name: str, model: Model | None = None, *, reads_data: bool = True
) -> Config:
    """Checks a configuration and this machine, and sets this process up for a host.

    Pinning and jax's environment have full effect only if jax is not loaded yet.

    Args:
      config: The configuration.
      name: The host's name, such as ``server``, ``d0`` or ``n1``.
      model: The user's own model, if it is not the configured one.
      reads_data: Whether the host reads ``data.source``.

    Returns:
      The resolved configuration.

    Raises:
      ConfigError: It is not valid, or this machine cannot run the host.
    """
    models = () if model is None else (config.model.name,)
    resolved = resolve(config, models=models, reads_data=reads_data)
    machine.check(resolved, [name])
    process.set_environment(resolved, name)
    process.claim_platform(hosts_of(resolved), name)
    return resolved


def check_device(config: Config, index: int, name: str = "index") -> None:
    """Checks that a device is one of the configuration's, of which some may come later.

    Args:
      config: The configuration.
      index: The device's index, counted from 0.
      name: What the message calls the index.

    Raises:
      ConfigError: There is no such device.
    """
    devices = config.devices
    more = f" and devices.more={devices.more}" if devices.more else ""
    _check_index(name, index, range(devices.total), f"devices.count={devices.count}{more}")


def _check_index(name: str, index: int, valid: range, said: str) -> None:
    """Checks that a host is one of the configuration's."""
    if index not in valid:
        expected = f"{valid[0]} to {valid[-1]}" if valid else "none"
        raise ConfigError(f"{name}={index} is not valid: {said}, so the index must be {expected}")
