"""Replies that a host still owes: it is allowed to send nothing else."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage, kind_of

#: Messages that a host may send at any time after joining.
UNASKED = (messages.Failed, messages.Leave, messages.NeighbourLost, messages.NonFinite,
           messages.Progress, messages.Pulse, messages.Working)  # fmt: skip
#: Before these a host compiles or times itself, for an unknown time.
TAKES_LONG = (messages.Prepared, messages.Profiled, messages.Referenced, messages.Calibrated,
              messages.Evaluated)  # fmt: skip


class Reply(NamedTuple):
    """A reply that a host owes.

    Attributes:
      kind: Class of the message.
      fields: Required values of some of its fields.
    """

    kind: type
    fields: tuple[tuple[str, Any], ...] = ()


def reply(kind: type, **fields: Any) -> Reply:
    """Returns a reply that is owed, with required values of some of its fields."""
    return Reply(kind, tuple(fields.items()))


#: The replies to each command; the replies to a round depend on the plan.
_ANSWERS: dict[type, tuple[type, ...]] = {
    messages.SurveyProfile: (messages.Profiled,),
    messages.SurveyReference: (messages.Referenced,),
    messages.SurveyEcho: (messages.Echoed,),
    messages.SurveySend: (messages.SurveyBytes, messages.SurveyBytes),
    messages.Prepare: (messages.Prepared,),
    messages.Calibrate: (messages.Calibrated,),
    messages.PullState: (messages.PulledState,),
    messages.PushState: (messages.PushedState,),
    messages.Finish: (messages.Bye,),
}


def answers(command: ControlMessage) -> list[Reply]:
    """Returns the replies to a command."""
    if isinstance(command, messages.Look):
        return [reply(messages.LookSeen, look=command.look)]
    if isinstance(command, messages.PushState) and (command.round, command.step) != (None, None):
        return []  # whoever pushes a round's average names the replies
    if isinstance(command, messages.Evaluate):
        return [reply(messages.Evaluated, round=command.round)]
    if isinstance(command, messages.KeepState):
        return [reply(messages.KeptState, rounds=command.rounds)]
    if isinstance(command, messages.RestoreState):
        return [reply(messages.RestoredState, rounds=command.rounds)]
    if isinstance(command, messages.Meet):
        return [reply(messages.Met, number=command.number)]
    if isinstance(command, messages.CompileAhead):
        return [reply(messages.Compiled, number=command.number)]
    if isinstance(command, messages.Halt):
        return [reply(messages.Halted, round=command.round)]
    if isinstance(command, messages.Rewind):
        return [reply(messages.Rewound, round=command.round, step=command.step)]
    return [Reply(kind) for kind in _ANSWERS.get(type(command), ())]


def end_replies(index: int, *, traced: bool) -> list[Reply]:
    """Returns what a member owes when a round ends.

    Args:
      index: The round's number.
      traced: Whether it sends its trace.
    """
    traces = [reply(messages.TraceRows)] if traced else []
    return [reply(messages.Stored, round=index), *traces]


class Owed:
    """The replies that a host owes, in order for each kind; any thread may call it."""

    def __init__(self) -> None:
        """Begins empty."""
        self._lock = threading.Lock()
        self._owed: dict[type, deque[Reply]] = {}
        self._arriving: Counter[type] = Counter()

    def add(self, replies: Iterable[Reply]) -> None:
        """Adds the replies to a command; called before the command is sent."""
        with self._lock:
            for one in replies:
                self._owed.setdefault(one.kind, deque()).append(one)

    def settle(self, kinds: Iterable[type]) -> None:
        """Forgets the owed replies of some kinds."""
        with self._lock:
            for kind in kinds:
                self._owed.pop(kind, None)

    def owes(self, kinds: Iterable[type]) -> bool:
        """Returns whether a reply of any of some kinds is still owed."""
        with self._lock:
            return any(self._owed.get(kind) for kind in kinds)

    def expects(self, kind: type) -> bool:
        """Records that a bundle of a kind has arrived; returns whether it was requested."""
        with self._lock:
            self._arriving[kind] += 1
            return self._arriving[kind] <= len(self._owed.get(kind, ()))

    def objection(self, message: ControlMessage, *, bundle: bool) -> str | None:
        """Records a host's message; returns why it is not allowed, or None."""
        kind = type(message)
        name = kind_of(kind).name
        if kind in UNASKED:
            return None
        with self._lock:
            if bundle:
                self._arriving[kind] -= 1
            owed = self._owed.get(kind)
            if not owed:
                missing = sorted(kind_of(one).name for one, some in self._owed.items() if some)
                return (
                    f"{name!r}, which was not requested (requested: "
                    f"{', '.join(missing) or 'nothing'})"
                )
            wanted = owed.popleft()
        for field, value in wanted.fields:
            if (actual := getattr(message, field)) != value:
                return f"{name!r} with {field}={actual}, expected {value}"
        return None
