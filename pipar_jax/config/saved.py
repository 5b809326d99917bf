"""Configurations as text: saved with a run, printed, read, and compared between hosts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pipar_jax.config import schema
from pipar_jax.config.data_fields import OWN_SOURCES
from pipar_jax.config.fields import Config
from pipar_jax.config.host_fields import HIDDEN_TOKEN
from pipar_jax.config.hosts import Hosts
from pipar_jax.disk.json_text import JsonMapping, JsonObject, dumps
from pipar_jax.errors import ConfigError


def to_dict(config: Config) -> JsonObject:
    """Returns the configuration as nested values for JSON, including the token."""
    made = dataclasses.asdict(config)
    for group in (config.devices, config.nodes):
        made["devices" if group is config.devices else "nodes"]["overrides"] = {
            str(index): dict(fields) for index, fields in group.overrides.items()
        }
    return made


def from_dict(values: JsonMapping) -> Config:
    """Returns the configuration that ``to_dict`` wrote.

    Raises:
      ConfigError: A field is unknown, or the index of an override is not a number.
    """
    made = schema.from_dict(Config, values)
    for group in (made.devices, made.nodes):
        if not all(str(index).isdigit() for index in group.overrides):
            raise ConfigError(
                f"overrides={group.overrides!r} must map the index of a device or node to fields"
            )
        group.overrides = {int(index): dict(some) for index, some in group.overrides.items()}
    return made


def to_json(config: Config) -> str:
    """Returns the text that is saved with a run; the token is hidden."""
    values = to_dict(config)
    if values["network"]["token"] is not None:
        values["network"]["token"] = HIDDEN_TOKEN
    return dumps(values, indent=2, ensure_ascii=False) + "\n"


def to_text(config: Config) -> str:
    """Returns one line per group of fields, as printed at the start of a run."""
    values = json.loads(to_json(config))
    top = {name: value for name, value in values.items() if not isinstance(value, dict)}
    devices, nodes = values.pop("devices"), values.pop("nodes")
    groups = {
        "run": top,
        **{name: value for name, value in values.items() if isinstance(value, dict)},
        "devices": {"count": devices["count"], **devices["defaults"]},
        **{f"device {index}": some for index, some in devices["overrides"].items()},
    }
    if nodes["count"]:
        groups["nodes"] = {"count": nodes["count"], **nodes["defaults"]}
        groups |= {f"node {index}": some for index, some in nodes["overrides"].items()}
    groups["run"] = {**top, **values["run"]}
    return "\n".join(
        f"{name:<12} "
        + " ".join(f"{field}={'none' if some is None else some}" for field, some in group.items())
        for name, group in groups.items()
    )


def from_json(text: str) -> Config:
    """Returns the configuration of a text that ``to_json`` wrote.

    Raises:
      ConfigError: The text is not JSON, or not a configuration.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the saved configuration is not valid JSON: {error}") from error
    return from_dict(values)


def difference(ours: Config, theirs: Config) -> list[str]:
    """Returns the fields that must be equal on two hosts of a run but differ.

    Addresses, folders, links, emulated slowdowns and the devices' own data may differ.

    Args:
      ours: This host's configuration, resolved.
      theirs: The other host's, resolved.

    Returns:
      One text per field, such as ``model.name ('vgg5' here, 'resnet18' there)``.
    """
    devices = _differing_devices(ours, theirs)
    here, there = _shared(ours, devices), _shared(theirs, devices)
    return [
        f"{path} ({here.get(path)!r} here, {there.get(path)!r} there)"
        for path in dict.fromkeys([*here, *there])
        if here.get(path) != there.get(path)
    ]


_LOCAL = ("name", "debug", "run.", "checkpoint.", "stop.", "tuner.", "server.", "network.",
          "devices.defaults.", "nodes.defaults.", "data.download")  # fmt: skip
#: Beyond these a resumed run may differ from its checkpoint in how long it goes on, and in when a
#: round is over; ``docs/checkpoints.md`` has the list.
_FREE_ON_RESUME = ("epochs", "model.weights_match", "cohort.min_devices", "cohort.quorum",
                   "cohort.deadline_s", "cohort.first", "cohort.below", "cohort.wait_s",
                   "cohort.script")  # fmt: skip


def resume_difference(config: Config, saved: Config) -> list[str]:
    """Lists the fields in which a run must not differ from the checkpoint that it resumes.

    Args:
      config: The run's configuration, resolved.
      saved: The configuration in the checkpoint, resolved.

    Returns:
      One text per field, such as ``seed (0, in the checkpoint 1)``.
    """
    devices = _differing_devices(config, saved)
    here, there = _shared(config, devices), _shared(saved, devices)
    return [
        f"{path} ({here.get(path)!r}, in the checkpoint {there.get(path)!r})"
        for path in dict.fromkeys([*here, *there])
        if here.get(path) != there.get(path) and path not in _FREE_ON_RESUME
    ]


def _differing_devices(*configs: Config) -> list[int]:
    """Returns the devices that may differ from others: those with overrides, and the first without.

    A device may join a run of thousands, and a coordinator compares configurations at each join.
    """
    count = min(config.devices.total for config in configs)
    own = {index for config in configs for index in config.devices.overrides if index < count}
    plain = [index for index in range(len(own) + 1) if index < count and index not in own]
    return sorted({*own, *plain[:1]})


def _shared(config: Config, devices: Sequence[int]) -> JsonObject:
    """Returns by path what hosts of a run have in common, with what some devices do."""
    values: JsonObject = {}
    for option in schema.options(Config):
        is_path = option.field.metadata["path"] is not None  # each machine has its own files
        if not (is_path or option.path.startswith(_LOCAL)):
            value: Any = config
            for name in option.path.split("."):
                value = getattr(value, name)
            values[option.path] = value
    is_own = config.data.source.startswith(OWN_SOURCES)
    values["data.source"] = "the devices' own" if is_own else config.data.source
    hosts = Hosts(config, nodes=0)
    for index in devices:
        own = hosts.inherited(index)
        for name in ("cut", "micro_batches"):
            values[f"devices.{index}.{name}"] = own[name]
    return values
