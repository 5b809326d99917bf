"""The hosts of a run as values, parsed from what all hosts of a kind share and from overrides."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipar_jax.config.cohorts import may_lose, may_lose_nodes, places
from pipar_jax.config.fields import Config
from pipar_jax.config.host_fields import DeviceConfig, NodeConfig, ServerConfig
from pipar_jax.config.schema import LONGEST_S
from pipar_jax.config.slowdown import UNSLOWED, Slowdown, read_slowdown
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import (
    COORDINATOR,
    HostKind,
    device_name,
    host_index,
    host_kind,
    is_device,
    is_node,
    node_name,
)

if TYPE_CHECKING:  # the channel's modules load numpy
    from comms.emulation.shaping import LinkShape

_NAME = re.compile(r"([dn])(0|[1-9]\d{0,8})", re.ASCII)
#: Where a device's field comes from if neither the device nor the defaults of all have it.
_INHERITED = {
    "cut": "pipeline.cut", "micro_batches": "pipeline.micro_batches", "data_source": "data.source",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class HostSpec:
    """One host of a run: its configuration, complete and parsed.

    Attributes:
      name: Its name, such as ``d0``, ``n1`` or ``server``.
      kind: What it is.
      index: Its number among the hosts of its kind: devices from 0, nodes from 1.
      up: What its link is shaped to: a device's towards the server, a node's towards the next node.
      down: The other direction of that link.
      slowdown: How slow it is emulated to be.
      cores: The CPU cores that it runs on; none if it may run on any.
      platform: The platform that jax computes on.
      memory_mb: Limit of its memory in megabytes; 0 for none.
      rematerialise: Whether it computes forward passes again instead of keeping residuals.
      address: Where a node or the server listens: host and port.
      cut: A device's cut, if the method takes one.
      micro_batches: A device's micro-batches in each mini-batch.
      data_source: Where a device's samples come from.
    """

    name: str
    kind: HostKind
    index: int
    up: LinkShape
    down: LinkShape
    slowdown: Slowdown = UNSLOWED
    cores: frozenset[int] = frozenset()
    platform: str = "auto"
    memory_mb: float = 0.0
    rematerialise: bool = False
    address: tuple[str, int] = ("", 0)
    cut: int | str = 1
    micro_batches: int = 1
    data_source: str = ""

    @property
    def memory_bytes(self) -> float | None:
        """Limit of its memory; None for none."""
        return self.memory_mb * 1e6 if self.memory_mb else None


class Hosts:
    """All hosts of a run by name: the coordinator, the compute nodes, the devices.

    A host is parsed when it is first asked for, and what is equal is parsed once: a run may have
    thousands of devices, and most of its processes ask for one host.

    Args:
      config: The configuration, whose fields fit one by one.
      nodes: How many compute nodes take part: all that are configured, or with most methods none.
    """

    def __init__(self, config: Config, nodes: int) -> None:
        self._config, self._nodes = config, nodes
        self._specs: dict[str, HostSpec] = {}
        self._links: dict[str, tuple[LinkShape, LinkShape]] = {}
        self._slowdowns: dict[tuple[float, str], Slowdown] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices that may register."""
        return tuple(map(device_name, range(self._config.devices.total)))

    @property
    def expected(self) -> tuple[str, ...]:
        """Names of the devices that a run waits for; others may come in addition."""
        return self.devices[: self._config.devices.count]

    @property
    def started(self) -> tuple[str, ...]:
        """Names of the hosts that a launcher starts."""
        return (COORDINATOR, *self.nodes, *self.expected)

    @property
    def places(self) -> int:
        """How many places a round's cohort has."""
        return places(self._config.cohort, self._config.devices.total)

    @property
    def sampled(self) -> bool:
        """Whether a round's cohort is sampled from the present devices."""
        return self._config.cohort.size > 0

    def first_seat(self, name: str) -> str:
        """Returns what the plan calls a host before the first round.

        A sampled device may take any place, and all are alike.
        """
        return device_name(0) if self.sampled and is_device(name) else name

    @property
    def may_lose(self) -> bool:
        """Whether the run may go on without some of its devices."""
        return may_lose(self._config.cohort, self._config.devices.total)

    @property
    def may_lose_nodes(self) -> bool:
        """Whether the run may go on without some of its compute nodes."""
        config = self._config
        return self._nodes > 0 and may_lose_nodes(config.nodes, config.cohort, config.devices.total)

    def may_be_lost(self, name: str) -> bool:
        """Returns whether the run may go on without a host."""
        if name == COORDINATOR:
            return False
        return self.may_lose_nodes if is_node(name) else self.may_lose

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the compute nodes that take part."""
        return tuple(map(node_name, range(1, self._nodes + 1)))

    def __iter__(self) -> Iterator[str]:
        """Yields the hosts' names: the coordinator's, those of nodes, those of devices."""
        return iter((COORDINATOR, *self.nodes, *self.devices))

    def __len__(self) -> int:
        """Returns how many hosts take part."""
        return 1 + self._nodes + self._config.devices.total

    def __contains__(self, name: str) -> bool:
        """Returns whether a host of this name, which may be any text, takes part."""
        if (match := _NAME.fullmatch(name)) is None:
            return name == COORDINATOR
        index = int(match[2])
        return index < self._config.devices.total if match[1] == "d" else 0 < index <= self._nodes

    def __getitem__(self, name: str) -> HostSpec:
        """Returns a host.

        Raises:
          ConfigError: No host of this name takes part, or one of its fields cannot be used.
        """
        if name not in self._specs:
            if name not in self:
                raise ConfigError(
                    f"there is no host {name!r}: there are {self._config.devices.total} devices, "
                    f"counted from 0, and {self._nodes} compute nodes take part, counted from 1"
                )
            self._specs[name] = self.parse(name)
        return self._specs[name]

    def device(self, index: int) -> HostSpec:
        """Returns the device of an index.

        Raises:
          ConfigError: There is none, or one of its fields cannot be used.
        """
        return self[device_name(index)]

    def distinct_devices(self) -> list[HostSpec]:
        """Returns representatives of all devices: those with overrides, and one without.

        Sources of data contain a device's index, but have the same form for all.
        """
        own = self._config.devices.overrides
        plain = next((i for i in range(self._config.devices.total) if i not in own), None)
        indices = own if plain is None else (*own, plain)
        return [self.device(index) for index in sorted(indices)]

    def parse(self, name: str) -> HostSpec:
        """Returns a configured host, whether it takes part or not.

        Raises:
          ConfigError: One of its fields cannot be used; the message names field and value.
        """
        kind, fields, own = host_kind(name), self.fields(name), JsonObject()
        index = 0 if kind is HostKind.SERVER else host_index(name)
        path = functools.partial(self.path, name)
        link = "none" if isinstance(fields, ServerConfig) else fields.link
        if link not in self._links:
            self._links[link] = _parse_link(link, path("link"))
        up, down = self._links[link]
        trace = fields.slowdown_trace if isinstance(fields, DeviceConfig) else ""
        slow = fields.slowdown, trace
        if slow not in self._slowdowns:
            self._slowdowns[slow] = read_slowdown(*slow, path("slowdown_trace"))
        if isinstance(fields, DeviceConfig):
            own = self.inherited(index)
            own["data_source"] = own["data_source"].replace("{device}", str(index))
        else:
            own["address"] = fields.host, fields.port
        return HostSpec(
            name, kind, index, up, down,
            slowdown=self._slowdowns[slow],
            cores=_parse_cores(fields.cpus, path("cpus")),
            platform=fields.platform,
            memory_mb=fields.memory_mb,
            rematerialise=fields.rematerialise,
            **own,
        )  # fmt: skip

    def inherited(self, device: int) -> JsonObject:
        """Returns the fields of a device that it, all devices or the whole run may have."""
        fields = self.fields(device_name(device))
        values = {}
        for field, where in _INHERITED.items():
            group, _, above = where.partition(".")
            value = getattr(fields, field)
            values[field] = getattr(getattr(self._config, group), above) if value is None else value
        return values

    def fields(self, name: str) -> DeviceConfig | NodeConfig | ServerConfig:
        """Returns the fields of a host as configured: the defaults of its kind, overridden."""
        kind = host_kind(name)
        if kind is HostKind.SERVER:
            return self._config.server
        group = self._config.devices if kind is HostKind.DEVICE else self._config.nodes
        own = group.overrides.get(host_index(name), {})
        made: DeviceConfig | NodeConfig = dataclasses.replace(group.defaults, **own)
        return made

    def path(self, name: str, field: str) -> str:
        """Returns the path of a host's field, where it was set, such as ``devices.1.cpus``."""
        kind = host_kind(name)
        if kind is HostKind.SERVER:
            return f"server.{field}"
        group = self._config.devices if kind is HostKind.DEVICE else self._config.nodes
        if group.overrides.get(host_index(name), {}).get(field) is not None:
            return f"{kind}s.{host_index(name)}.{field}"
        if field in _INHERITED and getattr(group.defaults, field) is None:
            return _INHERITED[field]
        return f"{kind}s.defaults.{field}"


def _parse_link(text: str, field: str) -> tuple[LinkShape, LinkShape]:
    """Returns what a link is shaped to, up and down."""
    from comms.emulation.shaping import parse_link
    from comms.errors import ChannelError

    try:
        shapes = parse_link(text)
    except (ChannelError, ValueError) as error:
        raise ConfigError(f"{field}={text[:120]!r}: {error}") from error
    for shape in shapes:
        rates = [rate for rate in (shape.rate_mbps, *(r for _, r in shape.schedule)) if rate]
        if shape.delay_s > LONGEST_S or any(not 1e-6 <= rate <= 1e9 for rate in rates):
            raise ConfigError(
                f"{field}={text[:120]!r}: rates lie between 1e-6 and 1e9 Mbit/s, and a delay is at "
                f"most {LONGEST_S:g} s"
            )
    return shapes


def _parse_cores(text: str, field: str) -> frozenset[int]:
    """Returns the cores that a text such as ``0`` or ``1-3,5`` names; none for an empty text."""
    cores: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(
                f"{field}={text[:120]!r} is not valid: expected cores such as 0 or 1-3,5"
            )
        cores.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cores)
