"""Where a run is, as a device or node sees it: which command may come now, and what it may say."""

from __future__ import annotations

import enum
import math
from typing import Any

from pipar_jax.config import Hosts
from pipar_jax.errors import PlanError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import kind_of
from pipar_jax.roles.acceptance import next_steps, own_spans
from pipar_jax.runtime import moves
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.plan import COORDINATOR, OWNER, Plan, is_node

#: The most numbers of a sample that a node believes.
MOST_NUMBERS = 2**28


class Phase(enum.Enum):
    """What a host is at."""

    JOINING = "waits for the model"
    ASKED = "waits for the plan"
    PREPARING = "prepares the plan"
    IDLE = "waits for a round"
    TRAINING = "trains a round"
    CHANGING = "changes its plan"


_ALWAYS = (messages.Refused, messages.Abort, messages.Pulse, messages.Working)
_SURVEY = (messages.SurveyProfile, messages.SurveyReference, messages.SurveyEcho,
           messages.SurveySend, messages.SurveyBytes)  # fmt: skip
_MAY_COME: dict[Phase, tuple[type, ...]] = {
    Phase.JOINING: (messages.ModelFacts,),
    Phase.ASKED: (*_SURVEY, messages.Meet, messages.Prepare),
    Phase.PREPARING: (),
    Phase.IDLE: (messages.Meet, messages.Calibrate, messages.Release, messages.Fetch,
                 messages.Look, messages.CompileAhead, messages.Give, messages.Finish),
    Phase.TRAINING: (messages.Store, messages.TakeClientModel, messages.Look,
                     messages.CompileAhead),
    Phase.CHANGING: (messages.Adopt, messages.Look, messages.CompileAhead),
}  # fmt: skip


class Course:
    """Follows a run from one host's side; any thread may tell it of a reply.

    Attributes:
      phase: What the host is at.
      plan: The plan in force, once there is one.
      plans: It and the one before.
      samples: Samples of each device's epoch.
      steps: Steps of each device in the whole run.
      next: For each device the step that comes next, once the round under way is over.

    Args:
      hosts: The hosts of the run.
      name: The host's name.
      units: How many units the model has; None on a node, which is told of the model.
    """

    def __init__(self, hosts: Hosts, name: str, units: int | None) -> None:
        self._hosts, self._name, self._units = hosts, name, units
        self.phase = Phase.JOINING if is_node(name) else Phase.ASKED
        self.plan: Plan | None = None
        self.plans: tuple[Plan, ...] = ()
        self.samples: tuple[int, ...] = ()
        self.steps: tuple[int, ...] = ()
        self.next: dict[int, int] = {}
        self._round = -1
        self._coming: Plan | None = None
        self._turns: list[int] = []
        self._may_store = False

    def knows_model(self, units: int) -> None:
        """Takes note of the model."""
        self._units, self.phase = units, Phase.ASKED

    def replied(self, said: Any) -> None:
        """Takes note of what this host says, before it is sent."""
        if isinstance(said, messages.Prepared | messages.Stored | messages.Adopted):
            self.phase = Phase.IDLE
        elif isinstance(said, messages.Given):
            self.phase = Phase.CHANGING
        elif isinstance(said, messages.Trained):
            self._may_store = True

    def objection(self, said: Any) -> str | None:
        """Takes note of a command; returns why it may not come now, or does not fit, or None."""
        kind = type(said)
        if kind in _ALWAYS:
            return None
        allowed = _MAY_COME[self.phase]
        if kind not in allowed:
            names = ", ".join(kind_of(one).name for one in allowed) or "nothing"
            return f"while it {self.phase.value} (expected: {names})"
        check = getattr(self, f"_{kind_of(kind).name}", None)
        return None if check is None else check(said)

    # --- one for each message that says something ----------------------------------------------

    def _model(self, said: messages.ModelFacts) -> str | None:
        if math.prod(said.input_shape) > MOST_NUMBERS:
            return f"with samples of shape {list(said.input_shape)}, which nobody could hold"
        return None

    def _survey_profile(self, said: messages.SurveyProfile) -> str | None:
        if list(said.sizes) != sorted(set(said.sizes)):
            return f"with sizes {said.sizes[:10]}, which do not rise"
        return None

    def _meet(self, said: messages.Meet) -> str | None:
        for boundary in said.boundaries:
            ends = boundary[:2]
            if any(not self._is_host(end) or end == COORDINATOR for end in ends):
                return f"for {tuple(boundary)}, which are no neighbours of this run"
            missing = [end for end in ends if is_node(end) and end not in said.addresses]
            if self._name in ends and missing:
                return f"for {tuple(boundary)} without the address of {missing[0]}"
        return None

    def _plan(self, said: messages.Prepare) -> str | None:
        if (reason := self._odd_plan(said.plan)) is not None:
            return reason
        count = len(self._hosts.devices)
        if not len(said.samples) == len(said.steps) == count or 0 in (*said.samples, *said.steps):
            return (
                f"with samples {said.samples[:5]} and steps {said.steps[:5]}, expected a number "
                f"from 1 for each of {count} devices"
            )
        self.plan, self.plans = said.plan, (said.plan,)
        self.samples, self.steps = said.samples, said.steps
        self.next = dict.fromkeys(range(count), 0)
        self.phase = Phase.PREPARING
        return None

    def _release(self, said: messages.Release) -> str | None:
        assert self.plan is not None
        if said.round != self._round + 1:
            return f"of round {said.round}, expected {self._round + 1}"
        steps = dict(self.next)
        for span in said.spans:
            known = span.device in steps and span.first == steps[span.device]
            if not known or not span.first <= span.stop <= self.steps[span.device]:
                return f"with {tuple(span)}, expected spans that go on from {steps}"
            steps[span.device] = span.stop
        sequential = self.plan.order == "sequential"
        holder = said.holder
        if (
            len(said.demand) != len(self.steps)
            or (holder is not None) != sequential
            or (holder is not None and holder >= len(self.steps))
        ):
            return f"with holder {holder} and demand of {len(said.demand)} devices"
        self._round, self.next = said.round, next_steps(self.next, said.spans)
        turns = [span for i, span in enumerate(said.spans)
                 if not i or said.spans[i - 1].device != span.device]  # fmt: skip
        if turns and turns[0].device == holder:
            turns = turns[1:]
        self._turns = [span.first for span in own_spans(turns, self._name)] if sequential else []
        self._may_store, self.phase = False, Phase.TRAINING
        return None

    def _store(self, _: messages.Store) -> str | None:
        if not self._may_store:
            return "before its steps are over"
        self._may_store = False
        return None

    def _take_part(self, said: messages.TakeClientModel) -> str | None:
        if not self._turns or self._turns[0] != said.step:
            return f"for step {said.step}, expected {self._turns[:1] or 'none'}"
        self._turns.pop(0)
        return None

    def _ahead(self, said: messages.CompileAhead) -> str | None:
        return self._odd_plan(said.plan)

    def _give(self, said: messages.Give) -> str | None:
        assert self.plan is not None and self._units is not None
        reason = self._odd_plan(said.plan)
        reason = reason or moves.why_not_follow(self.plan, said.plan, self._units)
        if reason is None:
            self._coming = said.plan
        return reason

    def _adopt(self, said: messages.Adopt) -> str | None:
        if said.plan != self._coming or self.plan is None:
            return "of another plan than the one that was asked about"
        self.plans, self.plan, self._coming = (self.plan, said.plan), said.plan, None
        return None

    # --- small things ---------------------------------------------------------------------------

    def _odd_plan(self, plan: Plan) -> str | None:
        """Returns why no host of this run could follow a plan, or None."""
        assert self._units is not None
        return odd_plan(plan, self._hosts, self._units)

    def _is_host(self, name: str) -> bool:
        return name in self._hosts


def odd_plan(plan: Plan, hosts: Hosts, units: int) -> str | None:
    """Returns why no host of a run could follow a plan, or None.

    Args:
      plan: The plan.
      hosts: The hosts of the run.
      units: How many units the model has.
    """
    if len(plan.devices) != (count := len(hosts.devices)):
        return f"for {len(plan.devices)} devices, expected {count}"
    for one in plan.devices:
        if strange := [host for host in one.hosts if not (host == OWNER or host in hosts)]:
            return f"with stages on {strange[0]}, which is no host of this run"
        if one.cuts and one.cuts[-1] >= units:
            return f"with a cut at {one.cuts[-1]}, expected 1 to {units - 1}"
    try:
        check_executable(plan)
    except PlanError as error:
        return f"that cannot be carried out: {error}"
    return None
