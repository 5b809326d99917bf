"""Checks over several fields of a configuration, and checks that other modules define."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import re

from pipar_jax.config import paths, schema
from pipar_jax.config.cohorts import check_cohort
from pipar_jax.config.fields import Config
from pipar_jax.config.host_fields import MOST_DEVICES, DevicesConfig, NetworkConfig, NodesConfig
from pipar_jax.config.hosts import Hosts
from pipar_jax.config.intervals import aggregate_steps
from pipar_jax.config.optimizers import check_optimizer
from pipar_jax.config.sink_names import sink_names
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import COORDINATOR, WeightPolicy, node_name

#: The channel takes no shorter secret.
TOKEN_CHARACTERS = 8


def check_whole(config: Config) -> None:
    """Checks what types and bounds of single fields cannot express.

    What depends on the method, network or data set is checked in ``pipar_jax.methods.checks``.

    Args:
      config: A configuration whose fields fit one by one.

    Raises:
      ConfigError: A field is not valid; the message names the first such field, its value and a
        remedy.
    """
    if not re.fullmatch(r"[\w.+-]{1,100}", config.name) or config.name.strip(".") == "":
        raise ConfigError(
            f"name={config.name[:120]!r} names the run's folder: use letters, digits and . _ + - "
            "only, at most 100"
        )
    if not config.run.dir:
        raise ConfigError("run.dir is empty: name a folder, or . for the current one")
    aggregate_steps(config.aggregation)
    check_optimizer(config.optimizer)
    sink_names(config.run.sinks)
    _check_start(config)
    pipeline = config.pipeline
    _check_cut(pipeline.cut, "pipeline.cut")
    if pipeline.in_flight and pipeline.weights != WeightPolicy.SHARED:
        raise ConfigError(
            f"pipeline.in_flight={pipeline.in_flight} limits a stage with shared weights, but "
            "pipeline.weights='copy': set pipeline.weights=shared, or in_flight=0"
        )
    if config.devices.total > MOST_DEVICES:
        raise ConfigError(
            f"devices.count={config.devices.count} and devices.more={config.devices.more} are "
            f"more than {MOST_DEVICES} devices: lower one of them"
        )
    check_cohort(config.cohort, config.devices.total, config.run.nonfinite)
    hosts = Hosts(config, nodes=config.nodes.count)
    # Without nodes their defaults have no effect, but a slip in them is one all the same.
    for name in map(node_name, range(1, max(config.nodes.count, 1) + 1)):
        address, _ = hosts.parse(name).address
        _check_address(config.network, address, hosts.path(name, "host"))
    for device in hosts.distinct_devices():
        if device.cut != pipeline.cut:
            _check_cut(device.cut, hosts.path(device.name, "cut"))
    for field in ("pipeline.activation_codec", "pipeline.cotangent_codec", "aggregation.codec"):
        group, _, name = field.partition(".")
        dtype = config.model.weight_dtype if group == "aggregation" else config.model.dtype
        check_codec(getattr(getattr(config, group), name), field, dtype)
    _check_tls(config.network)
    _check_address(config.network, hosts[COORDINATOR].address[0], "server.host")
    _check_ports(hosts, config.nodes.count)


def _check_start(config: Config) -> None:
    """Checks where a run starts from, and when it ends."""
    weights, match = config.model.weights, config.model.weights_match
    if match and not weights:
        raise ConfigError(
            f"model.weights_match={match!r} chooses among the weights of model.weights, which is "
            "empty: name a run, a checkpoint or a file there"
        )
    # With auto one command begins a run and goes on with it: what it begins from is for the start.
    if weights and config.run.resume not in ("", "auto"):
        raise ConfigError(
            f"model.weights={weights!r} and run.resume={config.run.resume!r} both say where the "
            "run starts from: leave one empty, or write run.resume=auto, with which model.weights "
            "is for the start alone"
        )
    when = config.stop.when
    if when and not re.fullmatch(r"[\w.]+:\w+", when):
        raise ConfigError(f"stop.when={when!r} does not fit: write MODULE:FUNCTION")
    if config.cohort.script and config.run.resume:
        raise ConfigError(
            "cohort.script replays a run from its start, and run.resume begins in its middle: "
            "leave one empty"
        )


def _check_ports(hosts: Hosts, nodes: int) -> None:
    """Checks that no two hosts listen on the same address and port."""
    taken = {hosts[COORDINATOR].address: "server.port"}
    for index in range(1, nodes + 1):
        address = hosts.parse(node_name(index)).address
        field = f"nodes.{index}.port"
        if address[1] and (other := taken.get(address)) is not None:
            raise ConfigError(
                f"{field}={address[1]} at {address[0]} is that of {other} too: give each host that "
                "listens there a port of its own, or 0 for any free one"
            )
        taken[address] = field


def check_codec(text: str, field: str, dtype: str) -> None:
    """Checks that a text names a codec of the channel that supports a dtype.

    Raises:
      ConfigError: The text names none, or the codec does not support the dtype.
    """
    import numpy as np

    from comms import CodecError, parse_codec

    try:
        codec, parameter = parse_codec(text)
        codec.check(np.dtype(dtype), parameter)
        codec.encoded_bytes(np.dtype(dtype), (1,), parameter)
    except (CodecError, ValueError, OverflowError) as error:
        raise ConfigError(f"{field}={text[:120]!r} is not valid: {error}") from error


def _check_tls(network: NetworkConfig) -> None:
    """Checks that the TLS files exist and are complete."""
    for field in ("authority", "certificate", "key"):
        path = getattr(network, field)
        if path and not os.path.isfile(path):
            raise ConfigError(
                f"network.{field}={path!r}: there is no such file, or this user may not see it"
            )
    if bool(network.certificate) != bool(network.key):
        raise ConfigError(
            "network.certificate and network.key belong together: give both, or neither"
        )
    if network.require_certificate and not network.authority:
        raise ConfigError(
            "network.require_certificate needs network.authority, against which certificates are "
            "checked"
        )


def fit_overrides(config: Config, group: str) -> dict[int, JsonObject]:
    """Returns the overrides of single devices or nodes, converted and with absolute paths.

    Args:
      config: The configuration.
      group: ``devices`` (counted from 0) or ``nodes`` (counted from 1).

    Raises:
      ConfigError: An index is out of range, a field unknown, or a value not valid.
    """
    hosts: DevicesConfig | NodesConfig = getattr(config, group)
    first = 0 if group == "devices" else 1
    count = hosts.total if isinstance(hosts, DevicesConfig) else hosts.count
    known = {option.path: option for option in schema.options(type(hosts.defaults))}
    made: dict[int, JsonObject] = {}
    for index, fields in sorted(hosts.overrides.items()):
        if type(index) is not int or not first <= index < first + count:
            use = f"use {first} to {first + count - 1}, or " if count else ""
            raise ConfigError(
                f"{group}.overrides has index {index!r}, but {group}.count={hosts.count}: {use}"
                f"raise {group}.count"
            )
        made[index] = {}
        for name, value in fields.items():
            path = f"{group}.{index}.{name}"
            if name not in known:
                near = schema.did_you_mean(name, known)
                raise ConfigError(f"{path} is not a field of the configuration{near}")
            named = known[name]._replace(path=path)
            made[index][name] = paths.expand(named, schema.fit(named, value))
    return made


def read_token(token: str | None) -> str | None:
    """Returns the secret, resolving ``env:NAME`` and ``file:PATH``.

    Raises:
      ConfigError: The secret is missing, empty or too short.
    """
    from comms.errors import explain

    kind, _, rest = (token or "").partition(":")
    if kind == "env":
        if not os.environ.get(rest):
            raise ConfigError(
                f"network.token={token!r}: the environment variable {rest} is not set or empty"
            )
        return os.environ[rest]
    if kind == "file":
        try:
            token = pathlib.Path(rest).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"network.token={token!r} cannot be read: {explain(error)}"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"network.token={token!r} cannot be read: not a text file") from error
    if token == "":
        raise ConfigError("network.token is empty: give a secret, or none for no token")
    if token is not None and len(token) < TOKEN_CHARACTERS:
        raise ConfigError(
            f"network.token has {len(token)} characters and needs at least {TOKEN_CHARACTERS}, "
            "preferably random; to keep it out of the command line, use env:NAME or file:PATH"
        )
    return token


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(network: NetworkConfig, host: str, field: str) -> None:
    """Checks that ports reachable from other machines are protected, or explicitly open."""
    if not re.fullmatch(r"[\w.:%-]{1,253}", host):
        raise ConfigError(
            f"{field}={host[:120]!r} is not an address: give an IP address or a host name, and "
            "the port in its own field"
        )
    if not (is_loopback(host) or network.token or network.insecure):
        raise ConfigError(
            f"{field}={host!r} is reachable from other machines, and network.token is not set: "
            "give every host the same secret (--config.network.token=env:NAME), or allow it with "
            "--config.network.insecure=true"
        )


def _check_cut(cut: int | str, field: str) -> None:
    if isinstance(cut, int) and cut < 1:
        raise ConfigError(f"{field}={cut} leaves no unit on the device: the smallest cut is 1")
    if isinstance(cut, str) and not cut:
        raise ConfigError(f"{field} is empty: give a position (1, 2, …) or the name of a unit")
