"""The messages of the handshake as values, and the valid values of their fields.

Everything from a peer is validated: a message has exactly these fields, each with its type and
range. Numbers are whole with at most 62 bits, or finite; texts are printable or hexadecimal, and
bounded. Any violation is a ``HandshakeError`` of one line.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

from comms.errors import FrameError, HandshakeError
from comms.wire import bounded_json
from comms.wire.bounded_json import JsonBody, one_line

MAX_NAME = 200
MAX_REASON = 1000
MAX_COUNT = 1 << 62
MAX_SECONDS = 1e9
_T = TypeVar("_T")


class HandshakeStep(enum.IntEnum):
    """The kinds of handshake message."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSE = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule for a field.

    Attributes:
      expected: Description of valid values for errors.
      takes: Whether a JSON value is valid.
      made: Constructs the field's value.
    """

    expected: str
    takes: Callable[[Any], bool]
    made: Callable[[Any], Any] = lambda value: value


def is_name(value: object) -> bool:
    """Returns whether a value is a valid name of an endpoint."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME and value.isprintable()


def _hexadecimal(digits: int) -> Rule:
    pattern = re.compile(f"[0-9a-f]{{{digits}}}")
    return Rule(
        f"{digits} hexadecimal digits",
        lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None,
    )


def _optional(rule: Rule) -> Rule:
    return Rule(
        f"{rule.expected}, or null", lambda value: value is None or rule.takes(value), rule.made
    )


NAME = Rule(f"a printable text of 1 to {MAX_NAME} characters", is_name)
COUNT = Rule(
    f"a whole number from 0 to {MAX_COUNT}",
    lambda value: type(value) is int and 0 <= value <= MAX_COUNT,
)
SECONDS = Rule(
    f"seconds from 0 to {MAX_SECONDS:g}",
    lambda value: type(value) in (int, float) and 0 <= value <= MAX_SECONDS,
    float,
)
TRUTH = Rule("true or false", lambda value: type(value) is bool)
SESSION, NONCE, PROOF = _hexadecimal(32), _hexadecimal(32), _hexadecimal(64)
CODE = Rule(
    "a word of 1 to 32 lower-case letters",
    lambda value: isinstance(value, str) and re.fullmatch("[a-z]{1,32}", value) is not None,
)
REASON = Rule(
    f"a text of at most {MAX_REASON} characters",
    lambda value: isinstance(value, str) and len(value) <= MAX_REASON,
    one_line,
)


def ruled(rule: Rule, default: _T | None = None) -> _T:
    """Returns a field of a message; without a default it is required."""
    metadata = {"rule": rule}
    if default is None:
        return field(metadata=metadata)  # type: ignore[no-any-return]
    return field(metadata=metadata, default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """A message of the handshake."""

    step: ClassVar[HandshakeStep]

    @classmethod
    def read(cls, body: JsonBody) -> Self:
        """Decodes a message from a JSON object.

        Raises:
          HandshakeError: If a field is missing, unknown, or not valid.
        """
        rules = {field.name: field.metadata["rule"] for field in fields(cls)}
        who = f"{body['name']}: " if is_name(body.get("name")) else ""
        if unknown := sorted(body.keys() - rules.keys()):
            raise HandshakeError(
                f"{who}{cls.step.name} has a field {one_line(unknown[0], 40)!r}, expected only "
                f"{', '.join(rules)}"
            )
        values = {}
        for name, rule in rules.items():
            if name not in body:
                raise HandshakeError(f"{who}{cls.step.name} has no {name}")
            if not rule.takes(body[name]):
                raise HandshakeError(
                    f"{who}{cls.step.name}: {name} is {_shown(body[name])}, expected "
                    f"{rule.expected}"
                )
            values[name] = rule.made(body[name])
        return cls(**values)

    def write(self) -> JsonBody:
        """Returns the message as a JSON object."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms(Greeting):
    """The terms of one side: facts about itself and the stream.

    Attributes:
      name: Name of this side.
      session: 32 hexadecimal digits that name the stream, chosen by the connecting side.
      attempt: Number of connections that the connecting side has tried for this stream, including
        this one; an older one that arrives late is refused.
      received: Last sequence number received on this stream, 0 for a new one.
      partial_bytes: Payload bytes received of the frame after that.
      resumed: In WELCOME, whether the listener knew the stream.
      window_bytes: Credit that this side grants.
      resume_s: Seconds for which this side would keep a broken stream.
      checksum: Whether this side requests checksums of payloads; one side is enough.
    """

    name: str = ruled(NAME)
    session: str = ruled(SESSION)
    attempt: int = ruled(COUNT, 1)
    received: int = ruled(COUNT, 0)
    partial_bytes: int = ruled(COUNT, 0)
    resumed: bool = ruled(TRUTH, False)
    window_bytes: int = ruled(COUNT, 0)
    resume_s: float = ruled(SECONDS, 0.0)
    checksum: bool = ruled(TRUTH, False)

    def own(self) -> JsonBody:
        """Returns only these fields, for another message that includes them."""
        return {field.name: getattr(self, field.name) for field in fields(Terms)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Terms):
    """The first message of the connecting side.

    Attributes:
      nonce: 32 random hexadecimal digits.
      token: Whether this side has a token.
    """

    step = HandshakeStep.HELLO
    nonce: str = ruled(NONCE)
    token: bool = ruled(TRUTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge(Greeting):
    """The listener's answer to HELLO.

    Attributes:
      name: Name of the listener.
      nonce: 32 random hexadecimal digits.
      token: Whether the listener has a token.
    """

    step = HandshakeStep.CHALLENGE
    name: str = ruled(NAME)
    nonce: str = ruled(NONCE)
    token: bool = ruled(TRUTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Greeting):
    """The connecting side's answer to CHALLENGE.

    Attributes:
      proof: 64 hexadecimal digits, or None without a token.
    """

    step = HandshakeStep.PROOF
    proof: str | None = ruled(_optional(PROOF))


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Terms):
    """The listener's answer to PROOF, its last message.

    Attributes:
      proof: 64 hexadecimal digits, or None without a token.
    """

    step = HandshakeStep.WELCOME
    proof: str | None = ruled(_optional(PROOF))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Greeting):
    """The last message of a side that refuses.

    Attributes:
      code: "version", "token", "busy" or "handshake"; other codes mean the last.
      reason: The reason for people; one line.
    """

    step = HandshakeStep.REFUSE
    code: str = ruled(CODE)
    reason: str = ruled(REASON)


GREETINGS: dict[HandshakeStep, type[Greeting]] = {
    kind.step: kind for kind in (Hello, Challenge, Proof, Welcome, Refuse)
}


def read_greeting(step: HandshakeStep, data: bytes) -> Greeting:
    """Decodes the message of a step from JSON.

    Raises:
      HandshakeError: If it is not a valid message of that step.
    """
    try:
        body = bounded_json.decode(data, f"a handshake message ({step.name})")
    except FrameError as error:
        raise HandshakeError(f"the peer sent a malformed message: {error}") from error
    return GREETINGS[step].read(body)


def _shown(value: object) -> str:
    """Returns a peer's value for an error: one short printable line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
