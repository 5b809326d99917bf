"""Checks of a configuration against what is registered: networks, data sets and methods."""

from __future__ import annotations

import re

from pipar_jax.aggregation.rules import RULE_NAMES
from pipar_jax.config import (
    OWN_SOURCES,
    AggregationConfig,
    Config,
    DataConfig,
    DevicesConfig,
    Hosts,
    HostSpec,
    ModelConfig,
    may_lose,
    may_lose_nodes,
    schema,
)
from pipar_jax.config.plugins import check_args, check_named, check_pairs, is_own, read_args
from pipar_jax.config.tasks import check_task
from pipar_jax.config.texts import split_list
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.errors import ConfigError
from pipar_jax.methods.padding_checks import check_padding
from pipar_jax.methods.personal_checks import check_personal
from pipar_jax.methods.privacy_checks import check_privacy
from pipar_jax.methods.registry import METHODS, Method, in_turns, node_methods, server_methods
from pipar_jax.methods.robust_checks import check_robust
from pipar_jax.methods.tuner_checks import check_tuner
from pipar_jax.methods.unused_checks import check_unused
from pipar_jax.schedule.plan import Order, WeightPolicy
from stages.errors import StageError
from stages.names import ARGUMENTS, TOKEN_MODELS, UNITS, arguments_of


def check_registered(
    config: Config, models: tuple[str, ...] = (), *, reads_data: bool = True
) -> None:
    """Checks what depends on the network, the data set and the method that are named.

    Args:
      config: A configuration that fits otherwise.
      models: Names of models beyond those that ``stages`` registers.
      reads_data: Whether hosts read ``data.source``, and are not passed their data by a program.

    Raises:
      ConfigError: The first field that cannot work, with value and remedy.
    """
    hosts = Hosts(config, nodes=config.nodes.count)
    public = reads_data and config.data.source in PUBLIC_SOURCES
    _check_model(config.model, config.data.source if public else "", models)
    check_task(config.task, config.stop, config.checkpoint)
    _check_lora(config.lora.match, config.model.name, models)
    _check_data(config.data, config.devices, reads_data=reads_data)
    check_padding(config, reads_data=reads_data)
    rule = config.aggregation.rule
    check_named(rule, "aggregation.rule", "a rule", RULE_NAMES)
    check_args(config.aggregation.args, "aggregation.args", "aggregation.rule", rule)
    for device in hosts.distinct_devices():
        _check_device(config.data, device, hosts.path(device.name, "data_source"))
    check_tuner(config)
    method = METHODS.get(config.method)
    if method is not None:
        _check_nodes(config, method)
        if method.pipelined:
            _check_micro_batches(config.data.batch_size, hosts)
    _check_cohort(config, method)
    _check_averages(config, method)
    check_robust(config, method)
    check_privacy(config, models, reads_data=reads_data)
    _check_pattern(config.aggregation.personal, "aggregation.personal")
    check_personal(config)
    check_unused(config, reads_data=reads_data)


def _check_model(model: ModelConfig, source: str, models: tuple[str, ...]) -> None:
    """Checks that the network is known, and that it suits the public data set, if any."""
    known = (*UNITS, *models)
    name, takes = model.name, model.name in ARGUMENTS
    if not takes:
        check_args(model.args, "model.args", "model.name", name)
    else:
        check_pairs(model.args, "model.args")
        try:
            arguments_of(name, read_args(model.args))
        except StageError as error:
            raise ConfigError(f"model.args={model.args[:120]!r}: {error}") from error
    _check_pattern(model.trainable, "model.trainable")
    check_named(name, "model.name", "a network", known)
    if name in TOKEN_MODELS and name not in models and source:
        raise ConfigError(
            f"model.name={name!r} takes rows of tokens, and data.source={source!r} has "
            "images: choose another network, or tokens of your own (npz:PATH, npy:FOLDER, "
            "module:NAME:FUNCTION)"
        )


def _check_lora(match: str, name: str, models: tuple[str, ...]) -> None:
    """Checks that adapters are possible."""
    _check_pattern(match, "lora.match")
    if match and (is_own(name) or name in models):
        raise ConfigError(
            f"lora.match={match[:120]!r} adds adapters to registered networks: in your own use "
            "nnx.LoRA and set model.trainable=lora"
        )


def _check_pattern(text: str, field: str) -> None:
    """Checks that a text is a regular expression."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:  # nested too deep; a count too large
        raise ConfigError(
            f"{field}={text[:120]!r} is not a regular expression: {str(error)[:120]}"
        ) from error


def _check_source(source: str, field: str) -> None:
    """Checks that a text names a public data set or the user's own data.

    Raises:
      ConfigError: It names neither.
    """
    if source in PUBLIC_SOURCES:
        return
    kind, _, rest = source.partition(":")
    if kind in ("npz", "npy") and rest:
        return
    if kind == "module" and re.fullmatch(r"[\w.]+:\w+", rest):
        return
    if source.startswith(OWN_SOURCES):
        raise ConfigError(
            f"{field}={source!r} is not valid: write npz:PATH, npy:FOLDER or module:NAME:FUNCTION"
        )
    raise ConfigError(
        f"{field}={source!r} is not a data set{schema.did_you_mean(source, PUBLIC_SOURCES)} "
        f"(known: {', '.join(PUBLIC_SOURCES)}, npz:PATH, npy:FOLDER, module:NAME:FUNCTION)"
    )


def _check_data(data: DataConfig, devices: DevicesConfig, *, reads_data: bool) -> None:
    """Checks the sources of data, and the fields that apply to some of them only."""
    _check_source(data.source, "data.source")
    if data.augment not in ("none", "crop_flip") and not re.fullmatch(
        r"module:[\w.]+:\w+", data.augment
    ):
        raise ConfigError(
            f"data.augment={data.augment!r} is not an augmentation"
            f"{schema.did_you_mean(data.augment, ('none', 'crop_flip'))} (known: none, crop_flip, "
            "module:NAME:FUNCTION)"
        )
    if reads_data and data.classes and data.source in PUBLIC_SOURCES:
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
                f"data.test_source={data.test_source!r} is not valid: write npz:PATH, "
                "npy:FOLDER or module:NAME:FUNCTION"
            )
        _check_source(data.test_source, "data.test_source")
    if devices.more and data.source in PUBLIC_SOURCES:
        raise ConfigError(
            f"devices.more={devices.more} cannot be combined with data.source={data.source!r}, "
            f"whose samples are dealt to devices.count={devices.count} devices: additional devices "
            "need data of their own (data.source=npz:PATH or module:NAME:FUNCTION)"
        )
    if data.train_samples and data.train_samples < devices.count:
        raise ConfigError(
            f"data.train_samples={data.train_samples} is fewer than devices.count="
            f"{devices.count}: every device needs a sample"
        )


def _check_device(data: DataConfig, device: HostSpec, field: str) -> None:
    """Checks a device's own source of data against that of the run."""
    if device.data_source != data.source:
        _check_source(device.data_source, field)
        if (device.data_source in PUBLIC_SOURCES) != (data.source in PUBLIC_SOURCES):
            raise ConfigError(
                f"{field}={device.data_source!r} cannot be combined with "
                f"data.source={data.source!r}: either all devices share a public data set, "
                "or each has its own data"
            )


def _check_nodes(config: Config, method: Method) -> None:
    """Checks that the method and its compute nodes fit together."""
    count, pipeline = config.nodes.count, config.pipeline
    if method.uses_nodes and not count:
        raise ConfigError(
            f"method={config.method} runs its middle stages on compute nodes, and nodes.count=0: "
            "set --config.nodes.count"
        )
    if method.one_device and config.devices.total != 1:
        raise ConfigError(
            f"devices.count={config.devices.count}, but method={method.name} trains the data of "
            "one device on a chain of peers: set devices.count=1, the peers are nodes"
        )
    if not method.uses_nodes and pipeline.cuts:
        raise ConfigError(
            f"pipeline.cuts={pipeline.cuts!r} is for method={' or '.join(node_methods())}: use "
            "pipeline.cut"
        )
    if config.nodes.replicate_every and not method.uses_nodes:
        raise ConfigError(
            f"nodes.replicate_every={config.nodes.replicate_every} copies what compute nodes have, "
            f"and method={config.method} uses none: leave it 0, or use method="
            f"{' or '.join(node_methods())}"
        )
    if method.uses_nodes and any(
        "cut" in override for override in config.devices.overrides.values()
    ):
        raise ConfigError(
            f"method={config.method} has the same cuts on all devices: use pipeline.cuts instead "
            "of a device's cut"
        )


def _check_micro_batches(batch: int, hosts: Hosts) -> None:
    """Checks that a mini-batch has a sample for each of its micro-batches."""
    for device in hosts.distinct_devices():
        number = device.micro_batches
        if number > batch:
            field = hosts.path(device.name, "micro_batches")
            raise ConfigError(
                f"{field}={number} exceeds data.batch_size={batch}, and every "
                "micro-batch needs a sample: lower it, or raise data.batch_size"
            )


def _check_cohort(config: Config, method: Method | None) -> None:
    """Checks what a method cannot do with a cohort, or with losses."""
    cohort, shared = config.cohort, config.pipeline.weights == WeightPolicy.SHARED
    if cohort.size:
        if method is not None and method.uses_nodes:
            raise ConfigError(
                f"cohort.size={cohort.size:g} cannot be combined with method={method.name}: the "
                "links between devices and compute nodes belong to a place, and with cohort.size a "
                "device takes another place in each round; set cohort.size=0, with cohort.quorum "
                "for devices that come and go"
            )
        for index, fields in config.devices.overrides.items():
            if odd := [
                field for field in ("cut", "micro_batches") if fields.get(field) is not None
            ]:
                raise ConfigError(
                    f"devices.{index}.{odd[0]}={fields[odd[0]]!r} cannot be combined with "
                    f"cohort.size={cohort.size:g}: any device may take any place, so all are cut "
                    "alike; leave it out, or set cohort.size=0"
                )
    devices = config.devices.total
    may_lose_some = may_lose(cohort, devices) or may_lose_nodes(config.nodes, cohort, devices)
    if config.tuner.adapt and (cohort.size or may_lose_some):
        field = f"cohort.size={cohort.size:g}" if cohort.size else "a run that may lose hosts"
        raise ConfigError(
            f"tuner.adapt=true cannot be combined with {field}: its plans are made for the "
            "hosts that it knows; set tuner.adapt=false, or leave cohort.* and "
            "nodes.replicate_every as they are"
        )
    if cohort.first and method is not None and method.order == Order.SEQUENTIAL:
        raise ConfigError(
            f"cohort.first={cohort.first} cannot be combined with method={method.name}, whose "
            "devices take turns: leave it 0"
        )
    joint = method is None or (method.cuts and method.order == Order.PARALLEL)
    if shared and joint and (cohort.first or cohort.deadline_s):
        field = f"first={cohort.first}" if cohort.first else f"deadline_s={cohort.deadline_s:g}"
        raise ConfigError(
            f"cohort.{field} cannot be combined with pipeline.weights=shared, where each step "
            "waits for all devices, so that none has finished before the others: leave it 0 (a "
            "silent device is lost after network.deadline_s)"
        )


#: Fields of averages alone, and what they do there.
OF_AVERAGES = {
    "proximal_mu": "pulls weights to those of the last average",
    "rule": "says how updates are averaged",
    "learning_rate": "scales averaged updates",
    "weighted": "weights the average",
    "codec": "codes averaged weights",
}


def _check_averages(config: Config, method: Method | None) -> None:
    """Checks that there are averages, where a field of theirs is set."""
    set_, default = config.aggregation, AggregationConfig()
    changed = [one for one in OF_AVERAGES if getattr(set_, one) != getattr(default, one)]
    given = split_list(config.tuner.methods)
    chosen = given if method is None else (method.name,)
    turns = [name for name in chosen if name in in_turns()]
    if not changed or not turns:
        return
    if method is None:
        field = f"tuner.methods={config.tuner.methods!r} may choose {turns[0]}, where"
        rest = ",".join(name for name in given if name not in turns)
        remedy = f"tuner.methods={rest}" if rest else "another method"
    else:
        field = f"with method={method.name}"
        averaging = [name for name in server_methods() if name not in in_turns()]
        remedy = f"a method that averages ({', '.join(averaging)})"
    one = changed[0]
    raise ConfigError(
        f"aggregation.{one}={getattr(set_, one)} {OF_AVERAGES[one]}, and {field} "
        f"devices take turns and nothing is averaged: leave it {getattr(default, one)}, or use "
        f"{remedy}"
    )
