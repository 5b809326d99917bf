"""Messages by which states of units travel or go to a host's disk."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
from pipar_jax.protocol.values import MOST_STATES, PLAN, STATE_ROW, Count, RunName, StateRow
from pipar_jax.protocol.wire_fields import Many, Maybe, Prose, Truth, Whole
from pipar_jax.schedule.plan import Plan


@message("pull", Sender.COORDINATOR)
class PullState(ControlMessage):
    """Asks for what a host has of some units; answered by ``PulledState``."""

    wanted: Annotated[tuple[StateRow, ...], Many(STATE_ROW, MOST_STATES)]


@message("pulled", Sender.HOST, Form.EITHER)
class PulledState(ControlMessage):
    """What a host has of the units that it was asked for."""


@message("push", Sender.COORDINATOR, Form.BUNDLE)
class PushState(ControlMessage):
    """What a host has of some units from now on; at most one of the fields says why.

    Attributes:
      round: It is the average of this round, which is over then: answered by ``Stored``.
      step: In sequential order, the client-side model for the turn that opens with this step: not
        answered.
      plan: This plan holds from now on, and the states are of units that come to the host under
        it: answered by ``PushedState``.

    Without a reason the host begins from a state of the run, answered by ``PushedState`` too:
    ``optimizers`` says whether its optimiser states are with it, or stay as they are.
    """

    round: Annotated[int | None, Maybe(Whole())] = None
    step: Annotated[int | None, Maybe(Whole())] = None
    plan: Annotated[Plan | None, Maybe(PLAN)] = None
    optimizers: Annotated[bool, Truth()] = False


@message("pushed", Sender.HOST)
class PushedState(ControlMessage):
    """A host has taken what was pushed, and works by the plan that came with it."""


@message("keep", Sender.COORDINATOR)
class KeepState(ControlMessage):
    """A host writes its optimiser states to its own disk; answered by ``KeptState``.

    Attributes:
      run: The run's own name, which no other run has.
      rounds: Rounds that are over.
    """

    run: RunName
    rounds: Count


@message("kept", Sender.HOST)
class KeptState(ControlMessage):
    """A host's optimiser states are on its disk, or why they are not."""

    rounds: Count
    reason: Annotated[str | None, Maybe(Prose())]


@message("restore", Sender.COORDINATOR)
class RestoreState(ControlMessage):
    """A host goes back to its optimiser states on its own disk; answered by ``RestoredState``."""

    run: RunName
    rounds: Count


@message("restored", Sender.HOST)
class RestoredState(ControlMessage):
    """A host has its optimiser states back, or why they begin fresh."""

    rounds: Count
    missing: Annotated[str | None, Maybe(Prose())]
