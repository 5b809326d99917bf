"""Checks, before any host starts, that this machine has what the hosts need.

``resolve`` checks a configuration itself; here it is checked against cores, folders, certificates
and installed packages. Nothing here loads jax or runs the user's modules.
"""

from __future__ import annotations

import importlib.util
import os
import re
import ssl
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from comms.errors import ChannelError
from pipar_jax.config import (
    Config,
    DataConfig,
    Hosts,
    HostSpec,
    NetworkConfig,
    RunConfig,
    schema,
)
from pipar_jax.config.checkpoints import goes_on, read_facts, weights_of
from pipar_jax.config.sink_names import TENSORBOARD, sink_names
from pipar_jax.data.own import stored_samples
from pipar_jax.disk.files import describe_reading, is_folder
from pipar_jax.errors import ConfigError
from pipar_jax.launch.user_modules import check_function, is_importable
from pipar_jax.methods.privacy_checks import check_delta
from pipar_jax.methods.registry import hosts_of
from pipar_jax.schedule.plan import HostKind

#: What jax needs for a platform: plug-ins with a prefix, or a module.
_PLUGINS = {"cuda": ("cuda", "xla_cuda"), "tpu": ("tpu", "libtpu")}
_REMEDIES = {
    "cuda": "install pipar-jax[cuda12] on a machine with an NVIDIA GPU",
    "tpu": "install jax[tpu] on a machine with a TPU",
}


def check(config: Config, names: Iterable[str] | None = None) -> None:
    """Checks that this machine can run hosts of a run.

    Args:
      config: Resolved configuration.
      names: The hosts, such as ``server``, ``d0``, ``n1``; None for all that a run starts.

    Raises:
      ConfigError: Something is missing; the message names field, value and remedy.
    """
    hosts = hosts_of(config)
    wanted = [hosts[name] for name in (hosts.started if names is None else names)]
    _check_folders(config.data, config.run, wanted)
    _check_tls(config.network, wanted)
    # Most hosts are alike: equal requirements are checked once.
    for host in {(spec.cores, spec.platform): spec for spec in reversed(wanted)}.values():
        find_cores(hosts, host)
        check_platform(host.platform, hosts.path(host.name, "platform"))
    _check_functions(config)
    if base := config.model.base:
        if not os.path.isfile(base):
            raise ConfigError(
                f"model.base={base!r}: there is no such file here, and every host reads its own"
            )
        _check_tensors(Path(base), f"model.base={base!r}")
    if any(host.kind is HostKind.SERVER for host in wanted):
        _check_sinks(config.run.sinks)
        if config.stop.when:
            check_function(config.stop.when, "stop.when", *config.stop.when.split(":"))
        if (weights := config.model.weights) and not goes_on(config):
            _check_weights(weights)
        check_module(config.data.test_source, "data.test_source")
    devices = [host for host in wanted if host.kind is HostKind.DEVICE]
    if config.privacy.of_records:
        for host in {device.data_source: device for device in reversed(devices)}.values():
            samples = stored_samples(host.data_source) or 0
            check_delta(config.privacy, samples, f"samples of {host.data_source}")
    if devices:
        check_module(config.data.augment, "data.augment")
    for host in {device.data_source: device for device in reversed(devices)}.values():
        check_module(host.data_source, hosts.path(host.name, "data_source"))


def find_cores(hosts: Hosts, host: HostSpec) -> frozenset[int]:
    """Returns the cores that a host is pinned to; empty for any core.

    Raises:
      ConfigError: A core is not available, or this system cannot pin.
    """
    if not host.cores:
        return host.cores
    asked = f"{hosts.path(host.name, 'cpus')}={hosts.fields(host.name).cpus!r}"
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"{asked}: this system cannot pin a process to cores; leave it empty")
    free = os.sched_getaffinity(0)
    if not host.cores <= free:
        raise ConfigError(
            f"{asked} includes cores that this process may not use; available: "
            f"{', '.join(map(str, sorted(free)))}"
        )
    return host.cores


def check_platform(platform: str, field: str) -> None:
    """Checks that jax's plug-in for a platform is installed; jax itself finds the accelerator.

    Raises:
      ConfigError: The plug-in is not installed.
    """
    starts = _PLUGINS.get(platform)
    if starts is None or has_plugin(starts):
        return
    raise ConfigError(
        f"{field}={platform!r}, but jax is not installed for it: {_REMEDIES[platform]}, or set "
        f"--config.{field}=cpu"
    )


def no_device(platform: str, field: str, reason: str) -> ConfigError:
    """Returns the error for a platform of which jax finds no accelerator."""
    return ConfigError(
        f"{field}={platform!r}, but jax finds no such accelerator here ({reason}): "
        f"{_REMEDIES.get(platform, 'check its installation')}, or set --config.{field}=cpu"
    )


def _check_functions(config: Config) -> None:
    """Checks the modules of the user's functions that every host may need; data are a host's."""
    for option in schema.options(config):
        group, _, name = option.path.partition(".")
        if group not in ("data", "devices", "nodes") and "." not in name and name:
            value = getattr(getattr(config, group), name)
            if isinstance(value, str):
                check_module(value, option.path)


def _check_weights(weights: str) -> None:
    """Checks that there are weights to start from; only the server knows whether they fit.

    Raises:
      ConfigError: There are none, or what is there cannot be read.
    """
    said = f"model.weights={weights!r}"
    path, rounds = weights_of(Path(weights), said)
    if rounds is None:
        _check_tensors(path, said)
    else:
        read_facts(path, rounds)


def _check_tensors(path: Path, said: str) -> None:
    """Checks that a file is a whole one of safetensors, by its header and its size.

    Raises:
      ConfigError: It is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"{said}: {path} cannot be read as a file of safetensors: {describe_reading(error)}"
        ) from error


def check_module(source: str, field: str) -> None:
    """Checks that ``module:NAME:FUNCTION`` exists; other texts pass.

    Raises:
      ConfigError: There is no such module, or no such function in it.
    """
    kind, _, rest = source.partition(":")
    if kind == "module":
        check_function(source, field, *rest.split(":"))


def _check_folders(data: DataConfig, run: RunConfig, hosts: Iterable[HostSpec]) -> None:
    fields = {"data.data_dir": data.data_dir, "data.cache_dir": data.cache_dir}
    if any(host.kind is HostKind.SERVER for host in hosts):
        fields["run.dir"] = run.dir
    for field, path in fields.items():
        # One that is not there is made, or missed by who reads it.
        if path and is_folder(path, f"{field}={path!r}") and not os.access(path, os.X_OK):
            raise ConfigError(f"{field}={path!r}: this user may not use this folder; name another")


def _check_tls(network: NetworkConfig, hosts: Iterable[HostSpec]) -> None:
    """Checks that the TLS files can be read and suffice for the hosts."""
    from pipar_jax.runtime.setup import tls_options

    tls = tls_options(network)
    if tls is None:
        return
    if not network.certificate and any(host.kind is not HostKind.DEVICE for host in hosts):
        raise ConfigError(
            "network.certificate is empty, but network.authority is set: a host that listens "
            "(server, compute nodes) needs its own certificate, and network.key"
        )
    try:
        tls.client_context()
        if network.certificate:
            tls.server_context()
    except (ChannelError, ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"network.authority, network.certificate and network.key: {error}"
        ) from error


def _check_sinks(text: str) -> None:
    for name in sink_names(text):
        if name == TENSORBOARD:
            if not is_importable("tensorboardX"):
                raise ConfigError(
                    f"run.sinks={text!r} needs tensorboardX, which is not installed: "
                    "pip install 'pipar-jax[tensorboard]'"
                )
        else:
            check_function(text, "run.sinks", *name.split(":"))


def has_plugin(starts: tuple[str, ...]) -> bool:
    """Returns whether a plug-in of jax with a prefix is installed."""
    if any(importlib.util.find_spec(name) for name in starts):
        return True
    names = [point.name for point in metadata.entry_points(group="jax_plugins")]
    if (space := importlib.util.find_spec("jax_plugins")) is not None:
        for folder in space.submodule_search_locations or ():
            names += [path.stem for path in Path(folder).glob("*")]
    return any(re.match(start, name) for name in names for start in starts)
