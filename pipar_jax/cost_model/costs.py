"""What things cost: the durations and bytes that drive the simulator and the planners."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from comms.emulation.shaping import LinkShape

#: Seconds of a computation: device (``ALL`` for one that serves all), stage, kind, samples.
Seconds = Callable[[int, int, str, int], float]
#: Bytes of a result on the wire or in memory, by the same four.
Bytes = Callable[[int, int, str, int], float]


@dataclasses.dataclass(frozen=True, slots=True)
class LinkModel:
    """One direction of a link.

    Attributes:
      rate_bytes_s: Bytes per second; None is unlimited.
      delay_s: One-way delay of every message.
      message_s: Seconds that each message holds the link, whatever its size.
    """

    rate_bytes_s: float | None = None
    delay_s: float = 0.0
    message_s: float = 0.0

    @classmethod
    def of(cls, shape: LinkShape, message_s: float = 0.0) -> LinkModel:
        """Returns the model of an emulated link, with the rate that it has at the start."""
        rate = shape.rate_at(0.0)
        return cls(None if rate is None else rate * 1e6 / 8, shape.delay_s, message_s)

    def occupied_s(self, nbytes: float) -> float:
        """Returns the seconds for which a message holds the link, without the delay."""
        return self.message_s + (nbytes / self.rate_bytes_s if self.rate_bytes_s else 0.0)

    def transfer_s(self, nbytes: float) -> float:
        """Returns the seconds from a message's first byte leaving to its last one arriving."""
        return self.occupied_s(nbytes) + self.delay_s


_GRID = 2.0**38

#: A link that costs nothing.
FREE_LINK = LinkModel()


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """What a host's own network connection carries for all its links together.

    Attributes:
      out_bytes_s: Bytes per second out of the host; None is unlimited.
      in_bytes_s: Bytes per second into the host; None is unlimited.
    """

    out_bytes_s: float | None = None
    in_bytes_s: float | None = None


def on_grid(seconds: float) -> float:
    """Returns a duration as the nearest multiple of 2**-38 s (3.6 ps).

    Sums of such numbers are exact up to nine hours. Times that ought to be equal then are equal,
    and what is first does not depend on how additions round.
    """
    return round(seconds * _GRID) / _GRID


def no_cost(device: int, stage: int, kind: str, samples: int) -> float:
    """Is nothing: no seconds, no bytes."""
    del device, stage, kind, samples
    return 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """The durations, bytes and links of a prediction.

    Every function takes (device, stage, kind, samples); the host follows from the plan, and a
    stage's units may differ between devices, so the device is part of the question. Kinds are
    those of ``schedule``. For computations: F, B, L, U and A (samples 0 for U and A, device ``ALL``
    for A and for updates of shared weights).

    Attributes:
      compute_s: Seconds of a computation on its host.
      wire_bytes: Bytes of a message: SF and SB as they travel (coded, labels included), SA and RA
        for the weights of a stage, H for the device part with its optimiser state.
      links: Model of each direction (from, to); directions that are not named cost nothing. What a
        device sends shares one line, to whomever it goes.
      ports: Hosts whose links share a network connection.
      window_bytes: Bytes of activations and cotangents that a link direction takes before the
        receiver has consumed some; None is unlimited. An empty window takes one of any size. Where
        no side is the coordinator's, every boundary between two hosts has a link of its own.
      codec_s: Seconds of encoding (SF, SB) or decoding (RF, RB) on the host's codec worker, which
        is not its processor.
      held_bytes: Memory that a computation holds: F's until its B is over, L's while it runs.
      static_bytes: Memory of a host that is held throughout: weights, optimiser states, gradients.
      ahead: Computations that a host dispatches behind the running one.
    """

    compute_s: Seconds
    wire_bytes: Bytes = no_cost
    links: Mapping[tuple[str, str], LinkModel] = dataclasses.field(default_factory=dict)
    ports: Mapping[str, Port] = dataclasses.field(default_factory=dict)
    window_bytes: float | None = None
    codec_s: Seconds | None = None
    held_bytes: Bytes | None = None
    static_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ahead: int = 1
