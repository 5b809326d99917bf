"""What this machine must have for the hosts that run on it, looked for before any is started.

``resolve`` says whether a configuration can work at all; here it is held against cores, folders,
certificates, installed packages. Nothing here loads jax or runs a module of the user's.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import ssl
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from comms.errors import ChannelError
from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.config.checks import parse_cpus
from pipar_jax.config.sink_names import TENSORBOARD, sink_names
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import COORDINATOR, device_name, is_node

#: What jax needs for a platform: plug-ins by the start of their names, or a module.
_PLUGINS = {"cuda": ("cuda", "xla_cuda"), "tpu": ("tpu", "libtpu")}
_REMEDIES = {
    "cuda": "install pipar-jax[cuda12] on a machine with an NVIDIA GPU",
    "tpu": "install jax[tpu] on a machine with a TPU",
}


def all_hosts(config: Config) -> tuple[str, ...]:
    """Returns the names of all hosts of a run, the coordinator's first."""
    devices = map(device_name, range(config.devices.count))
    return (COORDINATOR, *configuration.nodes(config), *devices)


def check(config: Config, names: Iterable[str]) -> None:
    """Checks that this machine can be home to hosts of a run.

    Args:
      config: Resolved configuration.
      names: The hosts, such as ``server``, ``d0``, ``n1``.

    Raises:
      ConfigError: Something is missing; the message names field, value and remedy.
    """
    hosts = tuple(names)
    _check_folders(config, hosts)
    _check_tls(config, hosts)
    # Most hosts are alike: what is equal is looked for once.
    seen: set[tuple[str, str]] = set()
    for name in hosts:
        host = configuration.host(config, name)
        if (host.cpus, host.platform) not in seen:
            seen.add((host.cpus, host.platform))
            find_cores(config, name)
            check_platform(host.platform, field_of(config, name, "platform"))
    if COORDINATOR in hosts:
        _check_sinks(config.run.sinks)
        check_module(config.data.test_source, "data.test_source")
    own = config.devices.overrides
    devices = [name for name in hosts if name[0] == "d"]
    plain = [name for name in devices if int(name[1:]) not in own][:1]
    for name in [*plain, *(name for name in devices if int(name[1:]) in own)]:
        source = configuration.device(config, int(name[1:])).data_source or ""
        given = config.devices.defaults.data_source is not None or "data_source" in own.get(
            int(name[1:]), {}
        )
        check_module(source, field_of(config, name, "data_source") if given else "data.source")


def field_of(config: Config, name: str, field: str) -> str:
    """Returns the path of a host's field, where it was set: ``devices.1.cpus``, ``server.cpus``."""
    if name == COORDINATOR:
        return f"server.{field}"
    group = "nodes" if is_node(name) else "devices"
    own = getattr(config, group).overrides.get(int(name[1:]), {})
    return f"{group}.{name[1:] if field in own else 'defaults'}.{field}"


def find_cores(config: Config, name: str) -> frozenset[int]:
    """Returns the cores that a host is to run on; none if it may run on any.

    Raises:
      ConfigError: The cores asked for do not exist, or this system cannot pin.
    """
    text, field = configuration.host(config, name).cpus, field_of(config, name, "cpus")
    cores = parse_cpus(text, field)
    if not cores:
        return cores
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(
            f"{field}={text!r}: this system cannot pin a process to cores; leave it empty"
        )
    free = os.sched_getaffinity(0)
    if not cores <= free:
        raise ConfigError(
            f"{field}={text!r} names cores that this process may not use: it has "
            f"{', '.join(map(str, sorted(free)))}"
        )
    return cores


def check_platform(platform: str, field: str) -> None:
    """Checks that what jax needs for a platform is installed; whether there is a chip it says.

    Raises:
      ConfigError: It is not.
    """
    starts = _PLUGINS.get(platform)
    if starts is None or _has_plugin(starts):
        return
    raise ConfigError(
        f"{field}={platform!r}, but no jax for it is installed: {_REMEDIES[platform]}, or set "
        f"--config.{field}=cpu"
    )


def no_device(platform: str, field: str, reason: str) -> ConfigError:
    """Returns what to raise where jax finds no device of a platform."""
    return ConfigError(
        f"{field}={platform!r}, but jax finds no such device here ({reason}): "
        f"{_REMEDIES.get(platform, 'look at its installation')}, or set --config.{field}=cpu"
    )


def check_module(source: str, field: str) -> None:
    """Checks that the module of ``module:NAME:FUNCTION`` is there; other texts pass.

    Raises:
      ConfigError: No such module can be found.
    """
    kind, _, rest = source.partition(":")
    name = rest.partition(":")[0]
    if kind == "module" and not _is_importable(name):
        raise ConfigError(
            f"{field}={source!r}: there is no module {name!r} in the present folder, and none is "
            "installed"
        )


def _check_folders(config: Config, hosts: tuple[str, ...]) -> None:
    fields = {"data.data_dir": config.data.data_dir, "data.cache_dir": config.data.cache_dir}
    if COORDINATOR in hosts:
        fields["run.dir"] = config.run.dir
    for field, path in fields.items():
        if path and Path(path).exists() and not Path(path).is_dir():
            raise ConfigError(f"{field}={path!r} is a file: name a folder")


def _check_tls(config: Config, hosts: tuple[str, ...]) -> None:
    """Checks that the files of TLS can be read and suffice for what the hosts do."""
    from pipar_jax.runtime.setup import channel_options

    tls = channel_options(config).tls
    if tls is None:
        return
    if not config.network.certificate and any(name[0] != "d" for name in hosts):
        raise ConfigError(
            "network.certificate is empty, but network.authority is set: a host that listens "
            "(server, compute nodes) needs a certificate of its own, and network.key"
        )
    try:
        tls.client_context()
        if config.network.certificate:
            tls.server_context()
    except (ChannelError, ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"network.authority, network.certificate and network.key: {error}"
        ) from error


def _check_sinks(text: str) -> None:
    for name in sink_names(text):
        module = name.partition(":")[0]
        if name == TENSORBOARD:
            if not _is_importable("tensorboardX"):
                raise ConfigError(
                    f"run.sinks={text!r} needs tensorboardX, which is not installed: "
                    "pip install 'pipar-jax[tensorboard]'"
                )
        elif not _is_importable(module):
            raise ConfigError(
                f"run.sinks={text!r}: there is no module {module!r} in the present folder, and "
                "none is installed"
            )


def _is_importable(name: str) -> bool:
    """Returns whether a module can be found; none is imported, packages on the way neither."""
    where: list[str] | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        try:
            found = (
                importlib.util.find_spec(full)
                if count == 1
                else importlib.machinery.PathFinder.find_spec(full, where)
            )
        except (ValueError, ImportError):  # a module without a spec, which is loaded already
            return True
        if found is None:
            return False
        if count < len(parts):
            if found.submodule_search_locations is None:
                return False
            where = list(found.submodule_search_locations)
    return True


def _has_plugin(starts: tuple[str, ...]) -> bool:
    """Returns whether a plug-in of jax whose name begins so is installed."""
    if any(importlib.util.find_spec(name) for name in starts):
        return True
    names = [one.name for one in metadata.entry_points(group="jax_plugins")]
    if (space := importlib.util.find_spec("jax_plugins")) is not None:
        for folder in space.submodule_search_locations or ():
            names += [path.stem for path in Path(folder).glob("*")]
    return any(re.match(start, name) for name in names for start in starts)
