"""A profile: what each unit of a model costs on each host, and each link, as a value.

Times are measured on the hosts themselves at several micro-batch sizes
(``profiling/unit_times.py``), so that the cost of small micro-batches is known instead of assumed.
A profile serialises, and answers for sizes between those measured.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

from pipar_jax.cost_model.costs import FREE_LINK, LinkModel
from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import host_index, is_node


@dataclasses.dataclass(frozen=True, slots=True)
class UnitFacts:
    """What a unit takes wherever it runs.

    Attributes:
      name: Its name.
      parameter_bytes: Its weights.
      state_bytes: Its batch statistics.
      optimizer_bytes: Its optimiser state.
      output_bytes: What it returns, per sample; what crosses a cut behind it, each way.
      residual_bytes: What its forward keeps for its backward, per sample.
    """

    name: str
    parameter_bytes: float
    state_bytes: float
    optimizer_bytes: float
    output_bytes: float
    residual_bytes: float


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeOverhead:
    """What a run costs a host's processor beside the functions that it calls.

    Attributes:
      call_s: Seconds of each computation, whatever it is: threads, a message in and one out.
      byte_s: Seconds of each byte that a computation takes from a link or gives to one.
    """

    call_s: float = 0.0
    byte_s: float = 0.0


NO_HANDLING = RuntimeOverhead()


@dataclasses.dataclass(frozen=True, slots=True)
class HostProfile:
    """What each unit costs on one host, emulated slowness included.

    Attributes:
      sizes: The micro-batch sizes measured, rising.
      forward_s: For each unit its forward's seconds at each size; 0 for the last unit.
      backward_s: The same for its backward; the last unit's is its forward, loss and backward in
        one, as the server fuses them.
      update_s: For each unit the seconds of its optimiser step.
      call_s: Seconds of calling a compiled function that does nothing. A stage of several units is
        called once.
      average_s_per_byte: Seconds to average a byte of one device's weights; only for the server.
      memory_bytes: What a plan may take on this host; None is no limit.
      handling: What a run adds to computations; nothing where slowness is emulated: they then last
        as long as they are told to.
    """

    sizes: tuple[int, ...]
    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    update_s: tuple[float, ...]
    call_s: float = 0.0
    average_s_per_byte: float = 0.0
    memory_bytes: float | None = None
    handling: RuntimeOverhead = NO_HANDLING

    def __post_init__(self) -> None:
        """Checks that the tables fit together.

        Raises:
          PlanError: Sizes do not rise, or a table has another length.
        """
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise PlanError(f"a profile's sizes must be positive and rise, got {self.sizes}")
        units = len(self.update_s)
        tables = (self.forward_s, self.backward_s)
        if any(len(t) != units or any(len(r) != len(self.sizes) for r in t) for t in tables):
            raise PlanError(
                f"a profile of {units} units and sizes {self.sizes} needs a time for each of them"
            )

    def slowed(self, factor: float) -> HostProfile:
        """Returns the profile of a host on which computations last so many times longer."""
        return dataclasses.replace(
            self,
            forward_s=tuple(tuple(s * factor for s in row) for row in self.forward_s),
            backward_s=tuple(tuple(s * factor for s in row) for row in self.backward_s),
            update_s=tuple(s * factor for s in self.update_s),
            call_s=self.call_s * factor,
            average_s_per_byte=self.average_s_per_byte * factor,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device, its link to the server, and its data.

    Attributes:
      host: What units cost on it.
      samples: Samples it trains on in an epoch.
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
      host: What units cost on it.
      up: Its link to the next node.
      down: Its link from the next node.
    """

    host: HostProfile
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK


@dataclasses.dataclass(frozen=True, slots=True)
class CodecProfile:
    """What a codec does on these hosts.

    Attributes:
      ratio: Bytes on the wire per byte of a tensor.
      encode_s_per_byte: Seconds to encode a byte of a tensor.
      decode_s_per_byte: Seconds to decode what was a byte of a tensor.
    """

    ratio: float = 1.0
    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """All that a plan's time can be predicted from.

    Attributes:
      model: Name of the model.
      batch_size: Samples in a full mini-batch.
      units: The model's units, in order.
      server: The server host.
      devices: The devices, in order.
      codecs: What is known of codecs besides ``raw``, by name.
      window_bytes: Bytes a link takes before its receiver has consumed some; None is unlimited.
      weight_ratio: Bytes on the wire per byte of the weights that are averaged, by their codec.
      nodes: The compute nodes, n1 first.
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

    def __post_init__(self) -> None:
        """Checks that all hosts were asked about the same units.

        Raises:
          PlanError: A host's tables have another number of units, or there is no device.
        """
        if not self.devices:
            raise PlanError("a profile needs at least one device")
        others = [one.host for one in self.devices] + [one.host for one in self.nodes]
        for host in (self.server, *others):
            if len(host.update_s) != len(self.units):
                raise PlanError(
                    f"the profile of {self.model} has {len(self.units)} units, but a host's tables "
                    f"have {len(host.update_s)}: measure all hosts with the same model"
                )

    def of(self, host: str) -> DeviceProfile | NodeProfile:
        """Returns the device or compute node of a name."""
        index = host_index(host)
        return self.nodes[index - 1] if is_node(host) else self.devices[index]

    def steps(self, device: int) -> int:
        """Returns the steps in a device's epoch."""
        return -(-self.devices[device].samples // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the profile as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """Returns the profile that ``to_dict`` wrote.

        Raises:
          PlanError: A field is missing, unknown or does not fit.
        """
        try:
            devices = tuple(
                DeviceProfile(
                    host_from_dict(one["host"]), one["samples"],
                    LinkModel(**one["up"]), LinkModel(**one["down"]),
                )
                for one in values["devices"]
            )  # fmt: skip
            nodes = tuple(
                NodeProfile(host_from_dict(one["host"]), LinkModel(**one["up"]),
                            LinkModel(**one["down"]))
                for one in values.get("nodes", ())
            )  # fmt: skip
            codecs = {name: CodecProfile(**one) for name, one in values["codecs"].items()}
            units = tuple(UnitFacts(**one) for one in values["units"])
            server = host_from_dict(values["server"])
            rest = {
                "units": units,
                "server": server,
                "devices": devices,
                "codecs": codecs,
                "nodes": nodes,
            }
            return cls(**{**values, **rest})
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a profile: {error!r}") from error


def host_from_dict(values: Mapping[str, Any]) -> HostProfile:
    """Returns a host's profile from JSON values.

    Raises:
      PlanError: A field is missing, unknown or does not fit.
    """
    try:
        tables = {
            name: tuple(tuple(row) for row in values[name]) for name in ("forward_s", "backward_s")
        }
        lists = {name: tuple(values[name]) for name in ("sizes", "update_s")}
        handling = RuntimeOverhead(**values["handling"])
        return HostProfile(**{**values, **tables, **lists, "handling": handling})
    except (KeyError, TypeError) as error:
        raise PlanError(f"this is not a host's profile: {error!r}") from error


def interpolate(sizes: tuple[int, ...], times: tuple[float, ...], samples: int) -> float:
    """Returns the seconds of a micro-batch of any size.

    Linear between the sizes measured and beyond them, but never cheaper per sample below the
    smallest than at it, since small micro-batches are not: that would be an artefact of noise.

    Args:
      sizes: Sizes measured, rising.
      times: Seconds at each.
      samples: The size wanted.
    """
    if len(sizes) == 1:
        return times[0] * samples / sizes[0]
    right = min(max(bisect.bisect_left(sizes, samples), 1), len(sizes) - 1)
    (x0, x1), (y0, y1) = sizes[right - 1 : right + 1], times[right - 1 : right + 1]
    value = y0 + (y1 - y0) * (samples - x0) / (x1 - x0)
    if samples < sizes[0]:
        return max(value, times[0] * samples / sizes[0])
    return max(value, times[-1]) if samples > sizes[-1] else value
