"""Plans: cuts, hosts, micro-batches, codecs, order and weights.

Federated, split, split-federated, pipelined and multi-hop learning are all plans. Methods and the
tuner return plans, the runtime executes them and the simulator predicts them; neither of them sees
the name of a method.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import NamedTuple

from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import PlanError


class Order(enum.StrEnum):
    """In which order devices train."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


class WeightPolicy(enum.StrEnum):
    """Whose the weights of a stage are that serves several devices."""

    COPY = "copy"
    SHARED = "shared"


class Dispatch(enum.StrEnum):
    """Which of a host's ready actions runs next; see ``policies.py``."""

    FCFS = "fcfs"
    BACKWARD_FIRST = "backward_first"
    SLOWEST_FIRST = "slowest_first"
    FIXED = "fixed"


class HandOn(enum.StrEnum):
    """When the device part is handed to the next device, in sequential order."""

    EPOCH = "epoch"
    STEP = "step"


#: The device that owns the data, in ``DevicePlan.hosts``.
OWNER = "device"
#: The host with the role of the coordinator, in every plan.
COORDINATOR = "server"


def device_name(device: int) -> str:
    """Returns the host name of a device, such as ``d0``."""
    return f"d{device}"


def node_name(index: int) -> str:
    """Returns the host name of a compute node, such as ``n1``; nodes are counted from 1."""
    return f"n{index}"


class HostKind(enum.StrEnum):
    """What a host is."""

    DEVICE = "device"
    NODE = "node"
    SERVER = "server"


def host_kind(host: str) -> HostKind:
    """Returns what the host of a name is."""
    if host == COORDINATOR:
        return HostKind.SERVER
    return HostKind.NODE if is_node(host) else HostKind.DEVICE


def host_index(host: str) -> int:
    """Returns the number in a device's or compute node's name."""
    return int(host[1:])


def long_name(host: str) -> str:
    """Returns a host's name in words."""
    if host == COORDINATOR:
        return "the server"
    return f"compute node {host[1:]}" if is_node(host) else f"device {host[1:]}"


def is_node(host: str) -> bool:
    """Returns whether a host is a compute node."""
    return host[:1] == "n" and host[1:].isdecimal()


def is_device(host: str) -> bool:
    """Returns whether a host's name is a device's."""
    return host[:1] == "d" and host[1:].isdecimal()


@dataclasses.dataclass(frozen=True, slots=True)
class Codecs:
    """Names of the codecs on one boundary between two stages.

    Attributes:
      activation: Codec of activations.
      cotangent: Codec of cotangents.
    """

    activation: str = "raw"
    cotangent: str = "raw"


@dataclasses.dataclass(frozen=True, slots=True)
class DevicePlan:
    """The chain of one device and the micro-batches in it.

    Attributes:
      cuts: Positions between units, strictly increasing; ``len(hosts) - 1`` of them.
      hosts: Host of each stage, ``"device"`` for the device itself.
      micro_batches: Number of micro-batches of a mini-batch (at most one per sample).
      codecs: One pair per cut.
    """

    cuts: tuple[int, ...]
    hosts: tuple[str, ...]
    micro_batches: int = 1
    codecs: tuple[Codecs, ...] = ()

    def __post_init__(self) -> None:
        """Checks that the fields are consistent.

        Raises:
          PlanError: The numbers of hosts, cuts and codecs do not match, cuts do not increase, or
            there is no micro-batch.
        """
        if not self.codecs and self.cuts:
            object.__setattr__(self, "codecs", tuple(Codecs() for _ in self.cuts))
        if len(self.hosts) != len(self.cuts) + 1:
            raise PlanError(
                f"a device plan with {len(self.cuts)} cuts {self.cuts} has {len(self.cuts) + 1} "
                f"stages, but names {len(self.hosts)} hosts {self.hosts}: name one host per stage"
            )
        if len(self.codecs) != len(self.cuts):
            raise PlanError(
                f"a device plan with {len(self.cuts)} cuts needs as many codec pairs, "
                f"got {len(self.codecs)}"
            )
        if list(self.cuts) != sorted(set(self.cuts)) or (self.cuts and self.cuts[0] < 1):
            raise PlanError(f"cuts must be positive and strictly increasing, got {self.cuts}")
        if self.micro_batches < 1:
            raise PlanError(
                f"a plan needs at least one micro-batch per mini-batch, got {self.micro_batches}"
            )

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.hosts)

    def __str__(self) -> str:
        """Returns ``device|1|server x4``: the chain with its cuts, and the micro-batches."""
        parts = [self.hosts[0]]
        for cut, host, codecs in zip(self.cuts, self.hosts[1:], self.codecs, strict=True):
            coded = codecs != Codecs()
            parts.append(
                f"|{cut}"
                + (f":{codecs.activation}/{codecs.cotangent}" if coded else "")
                + f"|{host}"
            )
        return "".join(parts) + (f" x{self.micro_batches}" if self.cuts else "")


class Boundary(NamedTuple):
    """A transition of chains from one host to the next, which has its own link.

    If two hosts are neighbours twice, as in a U-shape with one node, activations and cotangents
    would otherwise share the credit of a direction and could wait for each other.

    Attributes:
      lower: Host of the stage below.
      upper: Host of the stage above.
      below: Index of the stage below.
    """

    lower: str
    upper: str
    below: int

    def peer(self, host: str) -> str:
        """Returns the host on the other side."""
        return self.upper if self.lower == host else self.lower


#: What the fields of a plan that are words may say.
_CHOICES: Mapping[str, type[enum.StrEnum]] = {
    "order": Order, "weights": WeightPolicy, "dispatch": Dispatch, "hand_on": HandOn,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of all hosts of a run, as a value that prints, compares and serialises.

    Attributes:
      devices: One plan per device, in device order.
      order: ``parallel``, or ``sequential``: one device after another, with the client-side model
        handed on.
      weights: ``copy`` (a stage that serves several devices keeps a copy for each, averaged) or
        ``shared`` (one copy; in parallel order its gradients are summed over the devices).
      in_flight: With shared weights, the maximum number of micro-batches between forward and
        backward of a stage; 0 means no limit.
      dispatch: Policy that chooses the next of a host's ready actions.
      aggregate_every: Steps between two aggregations; 0 means once per epoch of each device.
      hand_on: In sequential order, when the client-side model is handed on.
    """

    devices: tuple[DevicePlan, ...]
    order: Order = Order.PARALLEL
    weights: WeightPolicy = WeightPolicy.COPY
    in_flight: int = 0
    dispatch: Dispatch = Dispatch.FCFS
    aggregate_every: int = 0
    hand_on: HandOn = HandOn.EPOCH

    def __post_init__(self) -> None:
        """Checks the values of the fields.

        Raises:
          PlanError: A value is not allowed, or the plan has no device.
        """
        if not self.devices:
            raise PlanError("a plan needs at least one device")
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                raise PlanError(f"plan.{name}={value!r} is not one of {', '.join(kind)}") from None
        if self.aggregate_every < 0 or self.in_flight < 0:
            raise PlanError("plan.aggregate_every and plan.in_flight must not be negative")

    @functools.cached_property
    def chains(self) -> tuple[tuple[str, ...], ...]:
        """For each device the names of the hosts of its stages."""
        return tuple(
            tuple(device_name(index) if name == OWNER else name for name in device.hosts)
            for index, device in enumerate(self.devices)
        )

    @functools.cached_property
    def places_of(self) -> dict[str, tuple[int, ...]]:
        """For each host the devices in whose chains it is, rising."""
        places: dict[str, list[int]] = {}
        for index, chain in enumerate(self.chains):
            for name in dict.fromkeys(chain):
                places.setdefault(name, []).append(index)
        return {name: tuple(of) for name, of in places.items()}

    def host(self, device: int, stage: int) -> str:
        """Returns the name of the host that runs a device's stage."""
        return self.chains[device][stage]

    def is_colocated(self, stage: int) -> bool:
        """Returns whether all devices have the same units in this stage, on the same host.

        Its weights are then averaged, or shared, on that host without traffic. Stages on the
        devices themselves are never colocated.
        """
        first = self.devices[0]
        if stage >= first.stages or first.hosts[stage] == OWNER:
            return False
        bounds = slice(max(stage - 1, 0), stage + 1)
        return all(
            device.stages > stage
            and device.hosts[stage] == first.hosts[stage]
            and device.cuts[bounds] == first.cuts[bounds]
            and (device.stages == stage + 1) == (first.stages == stage + 1)
            for device in self.devices
        )

    def is_shared(self, device: int, stage: int) -> bool:
        """Returns whether a device's stage uses the weights that all devices share."""
        return self.weights == WeightPolicy.SHARED and (
            self.is_colocated(stage)
            or (self.order == Order.SEQUENTIAL and self.devices[device].hosts[stage] != OWNER)
        )

    def local_stages(self, host: str) -> tuple[int, ...]:
        """Returns the stages whose weights are colocated on a compute node.

        They are averaged or shared there; the coordinator's copy of them is outdated.
        """
        return tuple(
            stage
            for stage in range(self.devices[0].stages)
            if host != COORDINATOR and self.is_colocated(stage) and self.host(0, stage) == host
        )

    def local_units(self, host: str, count: int) -> tuple[int, ...]:
        """Returns the indices of the units in these stages, in a model of ``count`` units."""
        return tuple(i for stage in self.local_stages(host) for i in self.units(0, stage, count))

    def held_units(self, host: str, count: int) -> tuple[int, ...]:
        """Returns the indices of all units of which a host has weights, in increasing order."""
        held = {
            unit
            for device, device_plan in enumerate(self.devices)
            for stage in range(device_plan.stages)
            if self.host(device, stage) == host
            for unit in self.units(device, stage, count)
        }
        return tuple(sorted(held))

    @property
    def sums_gradients(self) -> bool:
        """Whether devices in parallel share weights, so that gradients are summed over devices."""
        return self.weights == WeightPolicy.SHARED and self.order == Order.PARALLEL

    @property
    def has_single_micro_batches(self) -> bool:
        """Whether every step's gradient is that of one micro-batch, so that nothing is summed."""
        return not self.sums_gradients and all(device.micro_batches == 1 for device in self.devices)

    def hosts(self) -> tuple[str, ...]:
        """Returns all hosts of the plan, coordinator first, then in order of appearance."""
        names = dict.fromkeys([COORDINATOR])
        for device in range(len(self.devices)):
            names[device_name(device)] = None
        for device, plan in enumerate(self.devices):
            names.update(dict.fromkeys(self.host(device, s) for s in range(plan.stages)))
        return tuple(names)

    def boundary(self, device: int, below: int) -> Boundary:
        """Returns the boundary between a device's stage and the next, which may be on one host."""
        return Boundary(self.host(device, below), self.host(device, below + 1), below)

    def boundaries(self) -> tuple[Boundary, ...]:
        """Returns all boundaries between different hosts, each once."""
        boundaries: dict[Boundary, None] = {}
        for device, plan in enumerate(self.devices):
            for below in range(plan.stages - 1):
                boundary = self.boundary(device, below)
                if boundary.lower != boundary.upper:
                    boundaries[boundary] = None
        return tuple(boundaries)

    def units(self, device: int, stage: int, count: int) -> range:
        """Returns the indices of a stage's units in a model of ``count`` units."""
        bounds = (0, *self.devices[device].cuts, count)
        return range(bounds[stage], bounds[stage + 1])

    def __str__(self) -> str:
        """Returns the plan in one line; equal device plans are printed once."""
        texts = [str(plan) for plan in self.devices]
        if len(set(texts)) == 1:
            chain = f"{len(texts)} of {texts[0]}" if len(texts) > 1 else texts[0]
        else:
            chain = ", ".join(f"d{i} {text}" for i, text in enumerate(texts))
        if self.order == Order.SEQUENTIAL:
            rest = f"sequential, handed on each {self.hand_on}"
        else:
            every = f"{self.aggregate_every} steps" if self.aggregate_every else "epoch"
            rest = f"averaged each {every}"
        return f"{chain}; {self.weights} weights; {self.dispatch}; {rest}"

    def to_dict(self) -> JsonObject:
        """Returns the plan as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: JsonMapping) -> Plan:
        """Returns the plan that ``to_dict`` wrote.

        Raises:
          PlanError: A field is missing, unknown or not valid.
        """
        try:
            devices = tuple(
                DevicePlan(
                    cuts=tuple(device["cuts"]),
                    hosts=tuple(device["hosts"]),
                    micro_batches=device["micro_batches"],
                    codecs=tuple(Codecs(**pair) for pair in device["codecs"]),
                )
                for device in values["devices"]
            )
            return cls(**{**values, "devices": devices})
        except (KeyError, TypeError) as error:
            raise PlanError(f"this is not a plan: {error}; it has {sorted(values)}") from error
