"""Where a run is, as a device or node sees it: which command may come now, and what it may say."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from pipar_jax.config import Hosts
from pipar_jax.errors import PlanError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage, kind_of
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.acceptance import own_spans
from pipar_jax.runtime import moves
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.plan import (
    COORDINATOR,
    OWNER,
    Order,
    Plan,
    WeightPolicy,
    device_name,
    host_index,
    is_device,
    is_node,
)

#: The most numbers of a sample that a node believes.
MOST_NUMBERS = 2**28


class Phase(enum.Enum):
    """What a host is at."""

    JOINING = "waits for the model"
    ASKED = "waits for the plan"
    PREPARING = "prepares the plan"
    IDLE = "waits for a round"
    TRAINING = "trains a round"


_ALWAYS = (messages.Refused, messages.Abort, messages.Pulse, messages.Working)
_SURVEY = (messages.SurveyProfile, messages.SurveyReference, messages.SurveyEcho,
           messages.SurveySend, messages.SurveyBytes)  # fmt: skip
_MAY_COME: dict[Phase, tuple[type, ...]] = {
    Phase.JOINING: (messages.ModelFacts,),
    Phase.ASKED: (*_SURVEY, messages.Meet, messages.Prepare),
    Phase.PREPARING: (messages.Finish,),
    Phase.IDLE: (messages.Meet, messages.Calibrate, messages.Release, messages.PullState,
                 messages.PushState, messages.KeepState, messages.RestoreState, messages.Look,
                 messages.CompileAhead, messages.Evaluate, messages.Finish),
    Phase.TRAINING: (messages.Drop, messages.Halt, messages.Rewind, messages.Release,
                     messages.Commit, messages.PushState, messages.Look, messages.CompileAhead,
                     messages.Finish),
}  # fmt: skip


class Course:
    """Follows a run from one host's side; any thread may tell it of a reply.

    Attributes:
      phase: What the host is at.
      plan: The plan in force, once there is one.
      plans: It and the one before.
      ahead: Plans that may follow, which this host was told to compile.
      samples: Samples of each device's epoch.
      steps: Steps of each device in the whole run.
      seat: What the plan calls the host: a device after its place in the cohort.

    Args:
      hosts: The hosts of the run.
      name: The host's name.
      units: The model's units in order; None on a node, which is told of the model.
    """

    def __init__(self, hosts: Hosts, name: str, units: Sequence[str] | None) -> None:
        self._hosts, self._name, self._units = hosts, name, units
        self._sampled = is_device(name) and hosts.sampled
        self.seat = hosts.first_seat(name)
        self.phase = Phase.JOINING if is_node(name) else Phase.ASKED
        self.plan: Plan | None = None
        self.plans: tuple[Plan, ...] = ()
        self.samples: tuple[int, ...] = ()
        self.steps: tuple[int, ...] = ()
        self._round = -1
        self.ahead: set[Plan] = set()
        self._turns: list[int] = []
        self._attempt = 0
        self._spans: tuple[Span, ...] = ()
        self._may_commit = self._may_store = self._may_rewind = False
        self._rewound: int | None = None  # the step from which a round goes on

    def knows_model(self, units: Sequence[str]) -> None:
        """Records the model."""
        self._units, self.phase = units, Phase.ASKED

    def replied(self, said: ControlMessage) -> None:
        """Records a message of this host, before it is sent."""
        if isinstance(said, messages.Prepared | messages.Stored | messages.PushedState):
            self.phase = Phase.IDLE
        elif isinstance(said, messages.Trained):
            self._may_commit = True
        elif isinstance(said, messages.Dropped):
            self._may_commit, self.phase = False, Phase.IDLE
        elif isinstance(said, messages.Halted):
            self._may_commit, self._may_rewind = False, True
        elif isinstance(said, messages.Rewound):
            self._rewound = said.step

    def objection(self, said: ControlMessage) -> str | None:
        """Records a command; returns why it is not allowed now or does not fit, or None."""
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
        for one in (said.signature.input, *said.signature.sides.values(),
                    *said.signature.targets.values()):  # fmt: skip
            if math.prod(one.shape) > MOST_NUMBERS:
                return f"with samples of shape {list(one.shape)}, which nobody could hold"
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
        if strange := set(said.anew).difference(said.boundaries):
            return f"anew for {tuple(min(strange))}, which is not among its boundaries"
        return None

    def _plan(self, said: messages.Prepare) -> str | None:
        if (reason := self._odd_plan(said.plan)) is not None:
            return reason
        count = self._hosts.places
        if not len(said.samples) == len(said.steps) == count or 0 in (*said.samples, *said.steps):
            return (
                f"with samples {said.samples[:5]} and steps {said.steps[:5]}, expected a number "
                f"from 1 for each of {count} places"
            )
        self.plan, self.plans = said.plan, (said.plan,)
        self.samples, self.steps = said.samples, said.steps
        self.phase = Phase.PREPARING
        return None

    def _release(self, said: messages.Release) -> str | None:
        assert self.plan is not None
        if (reason := self._odd_attempt(said) or self._odd_spans(said)) is not None:
            return reason
        self._round, self._attempt, self._spans = said.round, said.attempt, said.spans
        if self._sampled:
            self.seat = device_name(said.cohort.index(host_index(self._name)))
        turns = [span for i, span in enumerate(said.spans)
                 if not i or said.spans[i - 1].device != span.device]  # fmt: skip
        if turns and turns[0].device == said.holder:
            turns = turns[1:]
        sequential = self.plan.order == Order.SEQUENTIAL
        self._turns = [span.first for span in own_spans(turns, self.seat)] if sequential else []
        self._may_commit = self._may_store = self._may_rewind = False
        self._rewound, self.phase = None, Phase.TRAINING
        return None

    def _odd_attempt(self, said: messages.Release) -> str | None:
        """Returns why a release may not come now, or None."""
        if said.attempt <= self._attempt:
            return f"of attempt {said.attempt}, expected one after {self._attempt}"
        if self.phase is Phase.TRAINING:  # the rest of a round of which a step failed
            goes_on = self._rewound is not None and said.round == self._round
            if not goes_on or any(span.first < (self._rewound or 0) for span in said.spans):
                return f"of round {said.round} in the midst of round {self._round}"
        elif said.round < self._round:
            return f"of round {said.round} after round {self._round}"
        return None

    def _odd_spans(self, said: messages.Release) -> str | None:
        """Returns what is wrong with a release's cohort and spans, or None."""
        assert self.plan is not None
        places, count = len(self.plan.devices), len(self._hosts.devices)
        if len(said.cohort) != places or len(set(said.cohort)) < places:
            return f"with a cohort of {said.cohort[:10]}, expected {places} devices"
        if self._sampled and host_index(self._name) not in said.cohort:
            return f"with a cohort of {said.cohort[:10]}, in which it has no place"
        if max(said.cohort) >= count:
            return f"with device {max(said.cohort)} in its cohort, expected {count} devices"
        sequential, stops = self.plan.order == Order.SEQUENTIAL, dict[int, int]()
        for span in said.spans:
            fits = span.device < places and span.first <= span.stop <= self.steps[span.device]
            again = span.device in stops and span.first != stops[span.device]
            if not fits or again or (sequential and span.first == span.stop):
                return f"with {tuple(span)}, expected spans of {places} places, step after step"
            stops[span.device] = span.stop
        holder = said.holder
        if (
            not len(said.demand) == len(said.samples) == places
            or 0 in said.samples
            or (holder is not None and (not sequential or holder >= places))
        ):  # fmt: skip
            return (
                f"with holder {holder}, demand of {len(said.demand)} and samples of "
                f"{len(said.samples)} devices"
            )
        return None

    def _drop(self, said: messages.Drop) -> str | None:
        spans = [span for span in self._spans if span.device == said.place]
        if said.round != self._round or not any(
            span.first <= said.step <= span.stop for span in spans
        ):
            return f"of place {said.place} from step {said.step} of round {said.round} on"
        return None

    def _halt(self, said: messages.Halt) -> str | None:
        assert self.plan is not None
        if said.round != self._round or not self.plan.sums_gradients:
            return f"of round {said.round}, where no step of several devices is under way"
        return None

    def _rewind(self, said: messages.Rewind) -> str | None:
        if said.round != self._round or not self._may_rewind:
            return f"of round {said.round}, which was not halted"
        self._may_rewind = False
        return None

    def _commit(self, said: messages.Commit) -> str | None:
        if not self._may_commit or said.round != self._round:
            return f"of round {said.round} before its steps of round {self._round} are over"
        if odd := [one for one in said.places if one >= len(self.steps)]:
            return f"of place {odd[0]}, expected one of {len(self.steps)}"
        self._may_commit, self._may_store = False, True
        return None

    def _pull(self, said: messages.PullState) -> str | None:
        assert self.plan is not None and self._units is not None
        count = len(self._units)
        own = {
            (copy, self._units[unit])
            for (copy, unit), host in moves.holders(self.plan, count).items()
            if host == self.seat
        }
        own |= {(EVERY, unit) for _, unit in own}
        local = {self._units[i] for i in self.plan.local_units(self.seat, count)}
        for copy, unit, parts in said.wanted:
            ruled = copy == EVERY and unit in local and self.plan.weights == WeightPolicy.COPY
            if (copy, unit) not in own or ("rule" in parts and not ruled):
                return f"for {', '.join(parts)} of copy {copy} of {unit!r}, which it has not"
        return None

    def _push(self, said: messages.PushState) -> str | None:
        assert self.plan is not None and self._units is not None
        training = self.phase is Phase.TRAINING
        if said.plan is not None:
            if training or said.plan not in self.ahead:
                return "of a plan that it was not told to compile"
            self.plans, self.plan = (self.plan, said.plan), said.plan
        elif said.round is not None:
            if not training or said.round != self._round or not self._may_store:
                return f"of round {said.round} before it was committed"
            self._may_store = False
        elif said.step is not None:
            if not training or self._turns[:1] != [said.step]:
                return f"for step {said.step}, expected {self._turns[:1] or 'none'}"
            self._turns.pop(0)
        elif training:
            return "in the midst of a round"
        return None

    def _ahead(self, said: messages.CompileAhead) -> str | None:
        assert self.plan is not None and self._units is not None
        reason = self._odd_plan(said.plan)
        reason = reason or moves.why_not_follow(self.plan, said.plan, len(self._units))
        if reason is None:
            self.ahead.add(said.plan)
        return reason

    # --- small things ---------------------------------------------------------------------------

    def _odd_plan(self, plan: Plan) -> str | None:
        """Returns why no host of this run could follow a plan, or None."""
        assert self._units is not None
        return odd_plan(plan, self._hosts, len(self._units))

    def _is_host(self, name: str) -> bool:
        return name in self._hosts


def odd_plan(plan: Plan, hosts: Hosts, units: int) -> str | None:
    """Returns why no host of a run could follow a plan, or None.

    Args:
      plan: The plan.
      hosts: The hosts of the run.
      units: How many units the model has.
    """
    if len(plan.devices) != (count := hosts.places):
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
