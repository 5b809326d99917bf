"""Costs: the durations and bytes that drive the simulator and the planners."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from comms.emulation.shaping import LinkShape
from pipar_jax.schedule.actions import ActionKind
from pipar_jax.schedule.plan import COORDINATOR, Plan, device_name, is_device

#: Seconds of a computation by device (``ALL`` for one that serves all), stage, kind, samples.
Seconds = Callable[[int, int, ActionKind, int], float]
#: Bytes of a result on the wire, by the same keys.
Bytes = Callable[[int, int, ActionKind, int], float]


@dataclasses.dataclass(frozen=True, slots=True)
class LinkModel:
    """One direction of a link.

    Attributes:
      rate_bytes_s: Bytes per second; None is unlimited.
      delay_s: One-way delay of every message.
      message_s: Seconds for which each message occupies the link in addition to its bytes.
    """

    rate_bytes_s: float | None = None
    delay_s: float = 0.0
    message_s: float = 0.0

    @classmethod
    def of(cls, shape: LinkShape, message_s: float = 0.0) -> LinkModel:
        """Returns the model of an emulated link, with its initial rate."""
        rate = shape.rate_at(0.0)
        return cls(None if rate is None else rate * 1e6 / 8, shape.delay_s, message_s)

    def occupied_s(self, nbytes: float) -> float:
        """Returns the seconds for which a message occupies the link, without the delay."""
        return self.message_s + (nbytes / self.rate_bytes_s if self.rate_bytes_s else 0.0)

    def transfer_s(self, nbytes: float) -> float:
        """Returns the seconds from the start of sending a message until its last byte arrives."""
        return self.occupied_s(nbytes) + self.delay_s


_GRID = 2.0**38

#: A link without any cost.
FREE_LINK = LinkModel()


def links_of_plan(
    plan: Plan, ends: Callable[[str], tuple[LinkModel, LinkModel]]
) -> dict[tuple[str, str], LinkModel]:
    """Returns the model of every direction of every link that a plan uses and that has a cost.

    A device's link is its own, whoever is at its other end; a node's leads to the next node.

    Args:
      plan: The plan.
      ends: Returns the link of a device, or of a node: away from it, and towards it.
    """
    links = {}
    for name in map(device_name, range(len(plan.devices))):
        links[name, COORDINATOR], links[COORDINATOR, name] = ends(name)
    for lower, upper, _ in plan.boundaries():
        if COORDINATOR not in (lower, upper):
            owner, other = (upper, lower) if is_device(upper) else (lower, upper)
            links[owner, other], links[other, owner] = ends(owner)
    return links


def on_grid(seconds: float) -> float:
    """Returns a duration as the nearest multiple of 2**-38 s (3.6 ps).

    Sums of such numbers are exact up to nine hours, so that times that should be equal are equal,
    and order does not depend on rounding.
    """
    return round(seconds * _GRID) / _GRID


def no_cost(device: int, stage: int, kind: ActionKind, samples: int) -> float:
    """Returns zero: no seconds, no bytes."""
    del device, stage, kind, samples
    return 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """The durations, bytes and links of a prediction.

    Every function takes (device, stage, kind, samples). The host follows from the plan; the device
    is an argument because the units of a stage may differ between devices. Kinds are those of
    ``schedule``. For computations: F, B, L, U and A (samples 0 for U and A, device ``ALL`` for A
    and for updates of shared weights).

    Attributes:
      compute_s: Seconds of a computation on its host.
      wire_bytes: Bytes of a message: SF and SB on the wire (coded, including labels), SA and RA for
        the weights of a stage, H for the client-side model with its optimiser state.
      links: Model of each direction (from, to); missing directions have no cost. All messages that
        a device sends share one link, whatever their destination.
      window_bytes: Credit of a link direction for activations and cotangents, in bytes; None is
        unlimited. An empty window accepts one of any size. Without the coordinator on either side,
        every boundary between two hosts has its own link.
      codec_s: Seconds of encoding (SF, SB) or decoding (RF, RB) on the host's codec worker, which
        is not its processor.
      ahead: Number of computations that a host dispatches while one is running.
      after_rest_s: Seconds that a computation takes more if its host has rested since the last of
        its stage and kind; None is none.
    """

    compute_s: Seconds
    wire_bytes: Bytes = no_cost
    links: Mapping[tuple[str, str], LinkModel] = dataclasses.field(default_factory=dict)
    window_bytes: float | None = None
    codec_s: Seconds | None = None
    ahead: int = 1
    after_rest_s: Seconds | None = None
