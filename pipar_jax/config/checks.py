"""Checks over several fields of a configuration, and checks that other modules define."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import re
from typing import Any, get_args

from pipar_jax.config import paths, schema
from pipar_jax.config.cohorts import check_cohort
from pipar_jax.config.fields import (
    CHAINS,
    OWN_SOURCES,
    PUBLIC_SOURCES,
    SERVER_METHODS,
    Config,
    DevicesConfig,
    NetworkConfig,
    NodesConfig,
)
from pipar_jax.config.hosts import Hosts, HostSpec, field_path
from pipar_jax.config.intervals import aggregate_steps
from pipar_jax.config.sink_names import sink_names
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import COORDINATOR, Dispatch, device_name, node_name
from stages.names import UNITS

#: Methods that cut mini-batches into micro-batches.
PIPELINED = ("pipar", *CHAINS)
#: Networks whose samples are rows of tokens, not images.
TOKEN_MODELS = tuple(name for name in UNITS if name.startswith("decoder"))
#: The channel takes no shorter secret.
TOKEN_CHARACTERS = 8


def check_whole(config: Config, models: tuple[str, ...] = ()) -> None:
    """Checks what types and bounds of single fields cannot express.

    Args:
      config: A configuration whose fields fit one by one.
      models: Names of models beyond those that ``stages`` registers.

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
    _check_model(config, models)
    _check_data(config)
    aggregate_steps(config)
    _check_tuner(config)
    sink_names(config.run.sinks)
    _check_cut(config.pipeline.cut, "pipeline.cut")
    hosts = Hosts(config)
    _check_nodes(config, hosts)
    check_cohort(config)
    hosts.parse(COORDINATOR)
    for index in distinct_devices(config):
        _check_device(config, hosts.device(index))
    for field in ("pipeline.activation_codec", "pipeline.cotangent_codec", "aggregation.codec"):
        _check_codec(config, field)
    _check_tls(config.network)
    _check_address(config.network, config.server.host, "server.host")
    _check_ports(config, hosts)
    _check_micro_batches(config, hosts)


def distinct_devices(config: Config) -> list[int]:
    """Returns representatives of all devices: those with overrides, and one without."""
    own = config.devices.overrides
    plain = next((index for index in range(config.devices.count) if index not in own), None)
    # Sources contain the device's index, but have the same form for all.
    return sorted([*own, *([] if plain is None else [plain])])


def _check_micro_batches(config: Config, hosts: Hosts) -> None:
    """Checks that a mini-batch has a sample for each of its micro-batches."""
    if config.method not in PIPELINED:
        return
    for index in distinct_devices(config):
        number = hosts.device(index).micro_batches
        if number > config.data.batch_size:
            field = field_path(config, device_name(index), "micro_batches")
            raise ConfigError(
                f"{field}={number} exceeds data.batch_size={config.data.batch_size}, and every "
                "micro-batch needs a sample: lower it, or raise data.batch_size"
            )


def _check_ports(config: Config, hosts: Hosts) -> None:
    """Checks that no two hosts listen on the same address and port."""
    taken = {(config.server.host, config.server.port): "server.port"}
    for index in range(1, config.nodes.count + 1):
        address = hosts.parse(node_name(index)).address
        field = f"nodes.{index}.port"
        if address[1] and (other := taken.get(address)) is not None:
            raise ConfigError(
                f"{field}={address[1]} at {address[0]} is that of {other} too: give each host that "
                "listens there a port of its own, or 0 for any free one"
            )
        taken[address] = field


def _check_codec(config: Config, field: str) -> None:
    """Checks that a field names a codec of the channel."""
    group, _, name = field.partition(".")
    check_codec(getattr(getattr(config, group), name), field, config.model.dtype)


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
        if path and not pathlib.Path(path).is_file():
            raise ConfigError(f"network.{field}={path!r}: there is no such file")
    if bool(network.certificate) != bool(network.key):
        raise ConfigError(
            "network.certificate and network.key belong together: give both, or neither"
        )
    if network.require_certificate and not network.authority:
        raise ConfigError(
            "network.require_certificate needs network.authority, against which certificates are "
            "checked"
        )


def check_source(source: str, field: str) -> None:
    """Checks that a text names a public data set or the user's own data.

    Raises:
      ConfigError: It names neither.
    """
    if source in PUBLIC_SOURCES:
        return
    kind, _, rest = source.partition(":")
    if kind == "npz" and rest:
        return
    if kind == "module" and re.fullmatch(r"[\w.]+:\w+", rest):
        return
    if source.startswith(OWN_SOURCES):
        raise ConfigError(
            f"{field}={source!r} is not valid: write npz:PATH or module:NAME:FUNCTION"
        )
    raise ConfigError(
        f"{field}={source!r} is not a data set{schema.did_you_mean(source, PUBLIC_SOURCES)} "
        f"(known: {', '.join(PUBLIC_SOURCES)}, npz:PATH, module:NAME:FUNCTION)"
    )


def fit_overrides(config: Config, group: str) -> dict[int, dict[str, Any]]:
    """Returns the overrides of single devices or nodes, converted and with absolute paths.

    Args:
      config: The configuration.
      group: ``devices`` (counted from 0) or ``nodes`` (counted from 1).

    Raises:
      ConfigError: An index is out of range, a field unknown, or a value not valid.
    """
    hosts: DevicesConfig | NodesConfig = getattr(config, group)
    first = 0 if group == "devices" else 1
    known = {one.path: one for one in schema.options(type(hosts.defaults))}
    made: dict[int, dict[str, Any]] = {}
    for index, fields in sorted(hosts.overrides.items()):
        if type(index) is not int or not first <= index < first + hosts.count:
            raise ConfigError(
                f"{group}.overrides has index {index!r}, but {group}.count={hosts.count}: use "
                f"{first} to {first + hosts.count - 1}, or raise {group}.count"
            )
        made[index] = {}
        for name, value in fields.items():
            path = f"{group}.{index}.{name}"
            if name not in known:
                near = schema.did_you_mean(name, known)
                raise ConfigError(f"{path} is not a field of the configuration{near}")
            one = known[name]._replace(path=path)
            made[index][name] = paths.expand(one, schema.fit(one, value))
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


def _check_model(config: Config, models: tuple[str, ...]) -> None:
    known = (*UNITS, *models)
    if config.model.name not in known:
        raise ConfigError(
            f"model.name={config.model.name!r} is not a "
            f"network{schema.did_you_mean(config.model.name, known)} (known: {', '.join(known)})"
        )
    name = config.model.name
    if name in TOKEN_MODELS and name not in models and config.data.source in PUBLIC_SOURCES:
        raise ConfigError(
            f"model.name={name!r} takes rows of tokens, and data.source={config.data.source!r} has "
            "images: choose another network, or tokens of your own (npz:PATH, module:NAME:FUNCTION)"
        )


def _check_data(config: Config) -> None:
    data = config.data
    check_source(data.source, "data.source")
    if data.classes and data.source in PUBLIC_SOURCES:
        raise ConfigError(
            f"data.classes={data.classes} is for your own data; data.source={data.source!r} "
            "defines its classes: leave it 0"
        )
    if data.scale and data.source in PUBLIC_SOURCES:
        raise ConfigError(
            f"data.scale={data.scale:g} is for your own data; data.source={data.source!r} has its "
            "own scale: leave it 0"
        )
    if data.test_source:
        if data.source in PUBLIC_SOURCES:
            raise ConfigError(
                f"data.test_source={data.test_source!r} is for your own data; "
                f"data.source={data.source!r} has its own test set: leave it empty"
            )
        if not data.test_source.startswith(OWN_SOURCES):
            raise ConfigError(
                f"data.test_source={data.test_source!r} is not valid: write npz:PATH or "
                "module:NAME:FUNCTION"
            )
        check_source(data.test_source, "data.test_source")
    if data.train_samples and data.train_samples < config.devices.count:
        raise ConfigError(
            f"data.train_samples={data.train_samples} is fewer than devices.count="
            f"{config.devices.count}: every device needs a sample"
        )


def _check_tuner(config: Config) -> None:
    """Checks the tuner's lists, and whether the run can adapt."""
    if config.tuner.times == "predicted" and config.model.dtype != "float32":
        raise ConfigError(
            f"tuner.times=predicted supports float32 only, and model.dtype={config.model.dtype}: "
            "profile the hosts (tuner.times=profiled), or compute in float32"
        )
    known = {
        "methods": SERVER_METHODS,
        "dispatch": get_args(Dispatch),
    }
    for name in ("methods", "dispatch", "codecs", "micro_batches", "sizes"):
        field, text = f"tuner.{name}", getattr(config.tuner, name)
        parts = _words(text)
        if not parts and name != "codecs":
            raise ConfigError(f"{field} is empty: name at least one; separate several by commas")
        for part in parts:
            if name in known and part not in known[name]:
                raise ConfigError(
                    f"{field}={text!r}: {part!r} is unknown"
                    f"{schema.did_you_mean(part, known[name])} (known: {', '.join(known[name])})"
                )
            if name == "codecs" and text != "auto":
                check_codec(part, field, config.model.dtype)
            numbers = name == "micro_batches" or (name == "sizes" and text != "auto")
            if numbers and not re.fullmatch(r"0*[1-9]\d{0,8}", part, re.ASCII):
                raise ConfigError(
                    f"{field}={text[:120]!r}: {part[:20]!r} is not a positive whole number below "
                    "10^9; write 2,4,8"
                )
    _check_tuner_numbers(config)
    if config.tuner.codecs:
        from pipar_jax.config import codec_candidates

        codec_candidates.pairs(config)
    if config.tuner.adapt and config.method not in CHAINS:
        if config.pipeline.weights == "shared":
            raise ConfigError(
                f"tuner.adapt=true cannot be combined with method={config.method} and "
                "pipeline.weights=shared: units can move only where every device has its own "
                "copy on the server, or between compute nodes; set pipeline.weights=copy, or "
                "tuner.adapt=false"
            )
        methods = {one.strip() for one in config.tuner.methods.split(",")}
        if config.method == "sl" or methods <= {"sl"}:
            raise ConfigError(
                f"tuner.adapt=true cannot be combined with method={config.method!r} and "
                f"tuner.methods={config.tuner.methods!r}: a plan can change only where devices "
                "train in parallel, and in sl they take turns; choose other methods, or set "
                "tuner.adapt=false"
            )
        if config.nodes.count:
            raise ConfigError(
                f"tuner.adapt=true cannot be combined with nodes.count={config.nodes.count} and "
                f"method={config.method}, whose plans change between device and server only; use "
                f"method={' or '.join(CHAINS)}, set nodes.count=0, or tuner.adapt=false"
            )


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_tuner_numbers(config: Config) -> None:
    """Checks the tuner's lists of numbers against the size of a mini-batch."""
    tuner, batch = config.tuner, config.data.batch_size
    if min(map(int, _words(tuner.micro_batches))) > batch:
        raise ConfigError(
            f"tuner.micro_batches={tuner.micro_batches!r}: all exceed data.batch_size={batch}, "
            "and every micro-batch needs a sample: name smaller numbers"
        )
    if tuner.sizes != "auto" and (most := max(map(int, _words(tuner.sizes)))) > batch:
        raise ConfigError(
            f"tuner.sizes={tuner.sizes!r}: no host computes {most} samples at a time, since "
            f"data.batch_size={batch}: name sizes up to {batch}"
        )


def _check_device(config: Config, device: HostSpec) -> None:
    """Checks what a device has of its own against what the run has."""

    def field(name: str) -> str:
        return field_path(config, device.name, name)

    if device.cut != config.pipeline.cut:
        _check_cut(device.cut, field("cut"))
    if device.data_source != config.data.source:
        check_source(device.data_source, field("data_source"))
        if (device.data_source in PUBLIC_SOURCES) != (config.data.source in PUBLIC_SOURCES):
            raise ConfigError(
                f"{field('data_source')}={device.data_source!r} cannot be combined with "
                f"data.source={config.data.source!r}: either all devices share a public data set, "
                "or each has its own data"
            )


def _check_nodes(config: Config, hosts: Hosts) -> None:
    """Checks that the method and its compute nodes fit together."""
    count, pipeline = config.nodes.count, config.pipeline
    if config.method in CHAINS and not count:
        raise ConfigError(
            f"method={config.method} runs its middle stages on compute nodes, and nodes.count=0: "
            "set --config.nodes.count"
        )
    if config.method == "accept" and config.devices.count != 1:
        raise ConfigError(
            f"devices.count={config.devices.count}, but method=accept trains the data of one "
            "device on a chain of peers: set devices.count=1, the peers are nodes"
        )
    if pipeline.in_flight and pipeline.weights != "shared":
        raise ConfigError(
            f"pipeline.in_flight={pipeline.in_flight} limits a stage with shared weights, but "
            "pipeline.weights='copy': set pipeline.weights=shared, or in_flight=0"
        )
    if config.method not in CHAINS and pipeline.cuts:
        raise ConfigError(
            f"pipeline.cuts={pipeline.cuts!r} is for method={' or '.join(CHAINS)}: use pipeline.cut"
        )
    if config.method in CHAINS and any("cut" in one for one in config.devices.overrides.values()):
        raise ConfigError(
            f"method={config.method} has the same cuts on all devices: use pipeline.cuts instead "
            "of a device's cut"
        )
    # Where no node takes part their defaults are of no use, but a slip in them is one all the same.
    for name in map(node_name, range(1, max(count, 1) + 1)):
        address, _ = hosts.parse(name).address
        _check_address(config.network, address, field_path(config, name, "host"))


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
