"""Messages of a run that adapts: what was seen, and candidate plans."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Sender, message
from pipar_jax.protocol.values import (
    DIRECT,
    MOST_HOSTS,
    SEEN,
    TIMING,
    Count,
    DirectTiming,
    Planned,
    Seen,
    Timing,
)
from pipar_jax.protocol.wire_fields import Many, Maybe, Prose


@message("look", Sender.COORDINATOR)
class Look(ControlMessage):
    """Asks for durations of computations and throughput of links; answered by ``LookSeen``."""

    look: Count


@message("seen", Sender.HOST)
class LookSeen(ControlMessage):
    """Durations of computations since the last query, and throughput of links so far."""

    look: Count
    rows: Annotated[tuple[Seen, ...], Many(SEEN, 100_000)]
    timed: Annotated[Timing, TIMING]
    direct: Annotated[tuple[DirectTiming, ...], Many(DIRECT, MOST_HOSTS)]


@message("ahead", Sender.COORDINATOR)
class CompileAhead(ControlMessage):
    """Asks to compile a candidate plan during training; answered by ``Compiled``."""

    number: Count
    plan: Planned


@message("compiled", Sender.HOST)
class Compiled(ControlMessage):
    """A host has compiled a candidate plan, or gives the reason why it refuses it."""

    number: Count
    refused: Annotated[str | None, Maybe(Prose())]
