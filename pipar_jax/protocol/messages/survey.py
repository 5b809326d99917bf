"""Messages by which the coordinator asks what hosts and links can do."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.cost_model.profile import HostProfile, RuntimeOverhead, UnitFacts
from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
from pipar_jax.protocol.values import (
    FACTS,
    HANDLING,
    HOST_PROFILE,
    MOST_BATCH,
    MOST_UNITS,
    PerLayer,
    Seconds,
)
from pipar_jax.protocol.wire_fields import Many, Maybe, Real, Whole


@message("survey_profile", Sender.COORDINATOR)
class SurveyProfile(ControlMessage):
    """Asks for the times of units at micro-batch sizes; answered by ``Profiled``."""

    sizes: Annotated[tuple[int, ...], Many(Whole(1, MOST_BATCH), 1000, 1)]


@message("profiled", Sender.HOST)
class Profiled(ControlMessage):
    """Times of units on a host, their sizes, and the duration of the measurement."""

    host: Annotated[HostProfile, HOST_PROFILE]
    units: Annotated[tuple[UnitFacts, ...], Many(FACTS, MOST_UNITS, 1)]
    seconds: Seconds


@message("survey_reference", Sender.COORDINATOR)
class SurveyReference(ControlMessage):
    """Asks for the times of reference layers; answered by ``Referenced``."""


@message("referenced", Sender.HOST)
class Referenced(ControlMessage):
    """Times of reference layers on a host, as ``ReferenceTimes``, and the memory it may use."""

    forward_s: PerLayer
    backward_s: PerLayer
    update_s: PerLayer
    parameter_bytes: PerLayer
    call_s: Seconds
    average_s_per_byte: Seconds
    handling: Annotated[RuntimeOverhead, HANDLING]
    seconds: Seconds
    prepared_s: Seconds
    memory_bytes: Annotated[float | None, Maybe(Real())]


@message("survey_echo", Sender.COORDINATOR)
class SurveyEcho(ControlMessage):
    """Asks for an immediate ``Echoed``, to measure a delay."""


@message("echoed", Sender.HOST)
class Echoed(ControlMessage):
    """Answers ``SurveyEcho``."""


@message("survey_send", Sender.COORDINATOR)
class SurveySend(ControlMessage):
    """Asks for two ``SurveyBytes``, a small one and one of the given size."""

    nbytes: Annotated[int, Whole(1, 1 << 30)]


@message("survey_bytes", Sender.BOTH, Form.BUNDLE)
class SurveyBytes(ControlMessage):
    """Filler bytes; a host answers every second one by ``Took``."""


@message("took", Sender.HOST)
class Took(ControlMessage):
    """The time from the first to the second of two ``SurveyBytes``."""

    seconds: Seconds
