"""What a host has been asked for and has not said yet: it may say nothing else."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage, kind_of

#: What a host may say whenever it has joined.
UNASKED = (messages.Failed, messages.Leave, messages.NonFinite, messages.Progress, messages.Pulse,
           messages.Working)  # fmt: skip
#: Before these a host compiles or times itself, which nobody can say the length of.
TAKES_LONG = (messages.Prepared, messages.Profiled, messages.Referenced, messages.Calibrated)


class Reply(NamedTuple):
    """An answer that a host owes.

    Attributes:
      kind: Class of the message.
      fields: What some of its fields must be.
    """

    kind: type
    fields: tuple[tuple[str, Any], ...] = ()


def reply(kind: type, **fields: Any) -> Reply:
    """Returns an answer that is owed, with what some of its fields must be."""
    return Reply(kind, tuple(fields.items()))


#: What each command is answered by; what a round is answered by depends on the plan.
_ANSWERS: dict[type, tuple[type, ...]] = {
    messages.Meet: (messages.Met,),
    messages.SurveyProfile: (messages.Profiled,),
    messages.SurveyReference: (messages.Referenced,),
    messages.SurveyEcho: (messages.Echoed,),
    messages.SurveySend: (messages.SurveyBytes, messages.SurveyBytes),
    messages.Prepare: (messages.Prepared,),
    messages.Calibrate: (messages.Calibrated,),
    messages.PullState: (messages.PulledState,),
    messages.PushState: (messages.PushedState,),
    messages.Halt: (messages.Halted,),
    messages.Rewind: (messages.Rewound,),
    messages.Finish: (messages.Bye,),
}


def answers(command: ControlMessage) -> list[Reply]:
    """Returns what a command is answered by."""
    if isinstance(command, messages.Look):
        return [reply(messages.LookSeen, look=command.look)]
    if isinstance(command, messages.PushState) and (command.round, command.step) != (None, None):
        return []  # of a round's average whoever pushes it says what is owed
    if isinstance(command, messages.CompileAhead):
        return [reply(messages.Compiled, number=command.number)]
    return [Reply(kind) for kind in _ANSWERS.get(type(command), ())]


class Owed:
    """The answers that one host owes, in order for each kind; any thread may call it."""

    def __init__(self) -> None:
        """Begins with none."""
        self._lock = threading.Lock()
        self._owed: dict[type, deque[Reply]] = {}
        self._arriving: Counter[type] = Counter()

    def add(self, replies: Iterable[Reply]) -> None:
        """Adds what a command is answered by; before the command is sent."""
        with self._lock:
            for one in replies:
                self._owed.setdefault(one.kind, deque()).append(one)

    def settle(self, kinds: Iterable[type]) -> None:
        """Forgets what is owed of some kinds."""
        with self._lock:
            for kind in kinds:
                self._owed.pop(kind, None)

    def owes(self, kinds: Iterable[type]) -> bool:
        """Returns whether an answer of one of some kinds is still to come."""
        with self._lock:
            return any(self._owed.get(kind) for kind in kinds)

    def expects(self, kind: type) -> bool:
        """Takes note that a bundle of a kind has arrived; returns whether it was asked for."""
        with self._lock:
            self._arriving[kind] += 1
            return self._arriving[kind] <= len(self._owed.get(kind, ()))

    def objection(self, message: ControlMessage, *, bundle: bool) -> str | None:
        """Takes note of what a host has said; returns why it may not say it, or None."""
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
                    f"{name!r}, which nobody asked it for (asked for: "
                    f"{', '.join(missing) or 'nothing'})"
                )
            wanted = owed.popleft()
        for field, value in wanted.fields:
            if (actual := getattr(message, field)) != value:
                return f"{name!r} with {field}={actual}, expected {value}"
        return None
