"""Profiles: costs of each unit of a model on each host, and of each link.

Times are measured on the hosts themselves at several micro-batch sizes
(``profiling/unit_times.py``), so that the cost of small micro-batches is measured, not assumed.
Profiles are serialisable and interpolate between the measured sizes.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping

from pipar_jax.cost_model.costs import FREE_LINK, LinkModel
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import host_index, is_node


@dataclasses.dataclass(frozen=True, slots=True)
class UnitFacts:
    """Sizes of a unit, which are the same on all hosts.

    Attributes:
      name: Name of the unit.
      parameter_bytes: Bytes of its weights.
      state_bytes: Bytes of its batch statistics.
      optimizer_bytes: Bytes of its optimiser state.
      output_bytes: Bytes of its output per sample, which cross a cut after it in each direction.
      residual_bytes: Bytes of its residuals per sample.
      sides: Names of its side inputs.
      personal_bytes: Bytes of those of its weights that devices keep for themselves.
    """

    name: str
    parameter_bytes: float
    state_bytes: float
    optimizer_bytes: float
    output_bytes: float
    residual_bytes: float
    sides: tuple[str, ...] = ()
    personal_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeOverhead:
    """Processor time of a host in a run, in addition to the functions that it calls.

    Attributes:
      call_s: Seconds per computation: threads, one message received and one sent.
      byte_s: Seconds per byte that a computation receives from or sends to a link.
    """

    call_s: float = 0.0
    byte_s: float = 0.0


NO_HANDLING = RuntimeOverhead()


@dataclasses.dataclass(frozen=True, slots=True)
class HostProfile:
    """Times of each unit on one host, including its emulated slowdown.

    Attributes:
      sizes: The measured micro-batch sizes, increasing.
      forward_s: Seconds of the forward by unit and size; 0 for the last unit.
      backward_s: Seconds of the backward; for the last unit of the fused forward, loss and
        backward.
      update_s: Seconds of the optimiser step by unit.
      call_s: Seconds of calling an empty compiled function. A stage of several units has one call.
      average_s_per_byte: Seconds to average a byte of one device's weights; server only.
      memory_bytes: Memory limit for plans on this host; None is no limit.
      handling: Overhead of a run per computation; zero with an emulated slowdown, which includes
        it.
      after_rest_s: For each unit the seconds that its first forward, backward (of the last unit:
        forward and backward) and update take more when the processor has rested before them;
        nothing where it is not known.
    """

    sizes: tuple[int, ...]
    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    update_s: tuple[float, ...]
    call_s: float = 0.0
    average_s_per_byte: float = 0.0
    memory_bytes: float | None = None
    handling: RuntimeOverhead = NO_HANDLING
    after_rest_s: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        """Checks that the tables are consistent.

        Raises:
          PlanError: Sizes do not increase, a table has another length, or a time is not finite.
        """
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise PlanError(f"a profile's sizes must be positive and increasing, got {self.sizes}")
        units = len(self.update_s)
        tables = (self.forward_s, self.backward_s)
        if any(len(t) != units or any(len(r) != len(self.sizes) for r in t) for t in tables):
            raise PlanError(
                f"a profile of {units} units and sizes {self.sizes} needs a time for each of them"
            )
        if self.after_rest_s and [len(row) for row in self.after_rest_s] != [3] * units:
            raise PlanError(
                f"a profile of {units} units needs three times after a rest for each of them, or "
                f"none, got {len(self.after_rest_s)}"
            )
        every = (*self.forward_s, *self.backward_s, self.update_s, *self.after_rest_s)
        if odd := [one for row in every for one in row if not math.isfinite(one)]:
            raise PlanError(f"a profile's times must be finite, got {odd[0]}")

    def slowed(self, factor: float) -> HostProfile:
        """Returns the profile with compute times multiplied by a factor."""
        return dataclasses.replace(
            self,
            forward_s=tuple(tuple(s * factor for s in row) for row in self.forward_s),
            backward_s=tuple(tuple(s * factor for s in row) for row in self.backward_s),
            update_s=tuple(s * factor for s in self.update_s),
            call_s=self.call_s * factor,
            average_s_per_byte=self.average_s_per_byte * factor,
            after_rest_s=tuple(
                (f * factor, b * factor, u * factor) for f, b, u in self.after_rest_s
            ),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device, its link to the server, and its data.

    Attributes:
      host: Times of the units.
      samples: Number of samples that it trains on in an epoch.
      up: Its link to the server.
      down: Its link from the server.
    """

    host: HostProfile
    samples: int
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK


@dataclasses.dataclass(frozen=True, slots=True)
class NodeProfile:
    """A compute node and its link to the next one.

    Attributes:
      host: Times of the units.
      up: Its link to the next node.
      down: Its link from the next node.
    """

    host: HostProfile
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK


@dataclasses.dataclass(frozen=True, slots=True)
class CodecProfile:
    """Ratio and speed of a codec on these hosts.

    Attributes:
      ratio: Bytes on the wire per byte of a tensor.
      encode_s_per_byte: Seconds to encode a byte of a tensor.
      decode_s_per_byte: Seconds to decode a byte of a tensor.
    """

    ratio: float = 1.0
    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """All measurements from which the time of a plan is predicted.

    Attributes:
      model: Name of the model.
      batch_size: Samples in a full mini-batch.
      units: The model's units, in order.
      server: The server host.
      devices: The devices, in order.
      codecs: Ratio and speed of codecs other than ``raw``, by name.
      window_bytes: Credit of a link in bytes; None is unlimited.
      weight_ratio: Bytes on the wire per byte of the weights that are averaged, by their codec.
      nodes: The compute nodes, n1 first.
      target_bytes: Bytes of each target per sample.
      side_bytes: Bytes of each side input per sample, by name.
    """

    model: str
    batch_size: int
    units: tuple[UnitFacts, ...]
    server: HostProfile
    devices: tuple[DeviceProfile, ...]
    codecs: Mapping[str, CodecProfile] = dataclasses.field(default_factory=dict)
    window_bytes: float | None = None
    weight_ratio: float = 1.0
    nodes: tuple[NodeProfile, ...] = ()
    target_bytes: tuple[float, ...] = (4.0,)
    side_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that all hosts have the same units.

        Raises:
          PlanError: A host's tables have another number of units, or there is no device.
        """
        if not self.devices:
            raise PlanError("a profile needs at least one device")
        others = [device.host for device in self.devices] + [node.host for node in self.nodes]
        for host in (self.server, *others):
            if len(host.update_s) != len(self.units):
                raise PlanError(
                    f"the profile of {self.model} has {len(self.units)} units, but a host's tables "
                    f"have {len(host.update_s)}: measure all hosts with the same model"
                )

    def of(self, host: str) -> DeviceProfile | NodeProfile:
        """Returns a device or compute node by name."""
        index = host_index(host)
        return self.nodes[index - 1] if is_node(host) else self.devices[index]

    def steps(self, device: int) -> int:
        """Returns the number of steps in an epoch of a device."""
        return -(-self.devices[device].samples // self.batch_size)

    def to_dict(self) -> JsonObject:
        """Returns the profile as values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: JsonMapping) -> Profile:
        """Returns the profile that ``to_dict`` wrote.

        Raises:
          PlanError: A field is missing, unknown or not valid.
        """
        try:
            devices = tuple(
                DeviceProfile(
                    host_from_dict(device["host"]), device["samples"],
                    LinkModel(**device["up"]), LinkModel(**device["down"]),
                )
                for device in values["devices"]
            )  # fmt: skip
            nodes = tuple(
                NodeProfile(host_from_dict(node["host"]), LinkModel(**node["up"]),
                            LinkModel(**node["down"]))
                for node in values.get("nodes", ())
            )  # fmt: skip
            codecs = {name: CodecProfile(**codec) for name, codec in values["codecs"].items()}
            units = tuple(unit_from_dict(unit) for unit in values["units"])
            server = host_from_dict(values["server"])
            rest = {
                "units": units,
                "server": server,
                "devices": devices,
                "codecs": codecs,
                "nodes": nodes,
                "target_bytes": tuple(values["target_bytes"]),
            }
            return cls(**{**values, **rest})
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a profile: {error!r}") from error


def unit_from_dict(values: JsonMapping) -> UnitFacts:
    """Returns a unit's sizes from JSON values."""
    return UnitFacts(**{**values, "sides": tuple(values["sides"])})


def host_from_dict(values: JsonMapping) -> HostProfile:
    """Returns a host's profile from JSON values.

    Raises:
      PlanError: A field is missing, unknown or not valid.
    """
    try:
        tables = {
            name: tuple(tuple(row) for row in values[name])
            for name in ("forward_s", "backward_s", "after_rest_s")
        }
        lists = {name: tuple(values[name]) for name in ("sizes", "update_s")}
        handling = RuntimeOverhead(**values["handling"])
        return HostProfile(**{**values, **tables, **lists, "handling": handling})
    except (KeyError, TypeError) as error:
        raise PlanError(f"this is not a host's profile: {error!r}") from error


def interpolate(sizes: tuple[int, ...], times: tuple[float, ...], samples: int) -> float:
    """Returns the seconds of a micro-batch of any size.

    Linear between the measured sizes and beyond them. Below the smallest size the time per sample
    is at least that of the smallest, since a lower one would be an artefact of noise.

    Args:
      sizes: The measured sizes, increasing.
      times: Seconds at each size.
      samples: Size of the micro-batch.
    """
    if len(sizes) == 1:
        return times[0] * samples / sizes[0]
    right = min(max(bisect.bisect_left(sizes, samples), 1), len(sizes) - 1)
    (x0, x1), (y0, y1) = sizes[right - 1 : right + 1], times[right - 1 : right + 1]
    value = y0 + (y1 - y0) * (samples - x0) / (x1 - x0)
    if samples < sizes[0]:
        return max(value, times[0] * samples / sizes[0])
    return max(value, times[-1]) if samples > sizes[-1] else value
