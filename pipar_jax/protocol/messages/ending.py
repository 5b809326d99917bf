"""Messages at the end of a run, or of one host."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
from pipar_jax.protocol.values import Words
from pipar_jax.protocol.wire_fields import Truth


@message("finish", Sender.COORDINATOR)
class Finish(ControlMessage):
    """The run has finished; answered by ``Bye``."""


@message("bye", Sender.HOST, Form.BUNDLE)
class Bye(ControlMessage):
    """The last message of a host, with its remaining timed actions."""


@message("abort", Sender.COORDINATOR)
class Abort(ControlMessage):
    """The run has ended early.

    Attributes:
      reason: The reason.
      again: Whether the coordinator is expected to continue it later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("failed", Sender.HOST)
class Failed(ControlMessage):
    """A host ends because of an error."""

    error: Words


@message("leave", Sender.HOST)
class Leave(ControlMessage):
    """A host was asked to end, and does not come back on its own."""

    reason: Words
