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
    """A host writes its own states to its own disk; answered by ``KeptState``.

    Attributes:
      run: The run's own name, which no other run has.
      rounds: Rounds that are over.
    """

    run: RunName
    rounds: Count


@message("kept", Sender.HOST)
class KeptState(ControlMessage):
    """A host's own states are on its disk, or why they are not."""

    rounds: Count
    reason: Annotated[str | None, Maybe(Prose())]


@message("restore", Sender.COORDINATOR)
class RestoreState(ControlMessage):
    """A host goes back to its states on its own disk; answered by ``RestoredState``.

    Attributes:
      run: The run's own name, which no other run has.
      rounds: Rounds that are over. Personal weights are the newest that are not of a later one.
      optimizers: Whether optimiser states, of exactly then, are taken up as well.
    """

    run: RunName
    rounds: Count
    optimizers: Annotated[bool, Truth()]


@message("restored", Sender.HOST)
class RestoredState(ControlMessage):
    """A host has its states back.

    Attributes:
      rounds: Rounds that are over.
      missing: Why its optimiser states, if it was to take them up, begin fresh; else None.
      personal: How many rounds were over when its personal weights became what they are, 0 for
        those of the start; None if it has none.
    """

    rounds: Count
    missing: Annotated[str | None, Maybe(Prose())]
    personal: Annotated[int | None, Maybe(Whole())]
