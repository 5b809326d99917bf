"""Messages before the first round: the plan, its compilation, calibration."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Sender, message
from pipar_jax.protocol.values import MOST_UNITS, Bytes, Count, PerDevice, Planned, RunName, Seconds
from pipar_jax.protocol.wire_fields import Many, OneOf, Text


@message("plan", Sender.COORDINATOR)
class Prepare(ControlMessage):
    """The plan, of which a host builds and compiles its share; answered by ``Prepared``.

    Attributes:
      plan: The plan.
      samples: Samples of each device's epoch.
      steps: Steps of each device in the whole run.
      run: The run's own name, which no other run has.
      base: For each unit the digest of its weights in the coordinator's file (``model.base``);
        empty if there are none.
    """

    plan: Planned
    samples: PerDevice
    steps: PerDevice
    run: RunName
    base: Annotated[tuple[str, ...], Many(Text(32, r"[0-9a-f]{0,32}"), MOST_UNITS)] = ()


@message("working", Sender.BOTH)
class Working(ControlMessage):
    """The sender is busy with long work, which suspends the deadline for ``network.working_s``.

    Attributes:
      what: The work.
      done: Number of finished parts, such as programs or units.
      of: Total number of parts; 0 if unknown.
    """

    what: Annotated[str, OneOf(("compiling", "timing", "tuning", "evaluating"))]
    done: Count
    of: Count


@message("prepared", Sender.HOST)
class Prepared(ControlMessage):
    """A host has compiled its share of the plan."""

    compile_s: Seconds
    memory_bytes: Bytes


@message("calibrate", Sender.COORDINATOR)
class Calibrate(ControlMessage):
    """Asks a slowed host to time its functions while others idle; answered by ``Calibrated``."""


@message("calibrated", Sender.HOST)
class Calibrated(ControlMessage):
    """A host has timed its functions."""

    seconds: Seconds
