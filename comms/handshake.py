"""The handshake: who is there, which protocol, is the token known, is this a new stream or an old.

Each message is a 12-byte preface, then JSON of at most 4 KiB::

    0  4  magic    the bytes PJXC
    4  2  version  version of the protocol
    6  1  kind     1 HELLO, 2 CHALLENGE, 3 PROOF, 4 WELCOME, 5 REFUSE
    7  1  zero
    8  4  length   bytes of JSON that follow

The connecting side sends HELLO, the listener CHALLENGE, the connecting side PROOF, the listener
WELCOME; either may send REFUSE instead and close. This preface never changes between versions, so
that each side can tell the other which version it would need. With a token, both prove it: a proof
is HMAC-SHA256 of the token over the side's name and every handshake byte before it, both sides'
random numbers among them, so that neither an old proof nor the other side's is worth anything. The
connecting side proves itself first: who merely scans for listeners gets nothing to guess against.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
import math
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from comms.errors import AuthenticationError, HandshakeError, VersionError
from comms.frame import MAGIC, VERSION

_PREFACE = struct.Struct("<4sHBBI")
_MAX_BODY_BYTES = 4096
MAX_NAME = 200
_MAX_NUMBER = 1 << 62


class Step(enum.IntEnum):
    """The kinds of handshake message."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one side tells the other about itself and about the stream.

    Attributes:
        name: name of this side.
        session: 32 hexadecimal digits that name the stream, chosen by the connecting side.
        attempt: how many connections the connecting side has tried for this stream, this one
            included; an older one that arrives late is refused.
        received: last sequence number received on this stream, 0 for a new one.
        partial_bytes: payload bytes received of the frame after that.
        resumed: in WELCOME, whether the listener knew the stream.
        window_bytes: credit that this side gives.
        resume_s: how long this side would keep a cut stream.
    """

    name: str
    session: str
    attempt: int = 1
    received: int = 0
    partial_bytes: int = 0
    resumed: bool = False
    window_bytes: int = 0
    resume_s: float = 0.0

    def to_body(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {
            "name": self.name,
            "session": self.session,
            "attempt": self.attempt,
            "received": self.received,
            "partial_bytes": self.partial_bytes,
            "resumed": self.resumed,
            "window_bytes": self.window_bytes,
            "resume_s": self.resume_s,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Terms:
        """Reads and checks the fields.

        Raises:
            HandshakeError: if one is missing, of the wrong type or out of range.
        """
        name, session = body.get("name"), body.get("session")
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise HandshakeError(f"the peer's name is no text of 1 to {MAX_NAME} characters")
        if not isinstance(session, str) or len(session) != 32 or not session.isalnum():
            raise HandshakeError(f"{name}: the session is no text of 32 digits")
        numbers = {}
        for field in ("attempt", "received", "partial_bytes", "window_bytes"):
            value = body.get(field)
            if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
                raise HandshakeError(f"{name}: {field} is {value!r}, expected a count")
            numbers[field] = value
        resume_s, resumed = body.get("resume_s"), body.get("resumed")
        if type(resume_s) not in (int, float) or not 0 <= resume_s < math.inf:  # type: ignore[operator]
            raise HandshakeError(f"{name}: resume_s is {resume_s!r}, expected seconds")
        if type(resumed) is not bool:
            raise HandshakeError(f"{name}: resumed is {resumed!r}, expected true or false")
        return cls(
            name=name,
            session=session,
            resumed=resumed,
            resume_s=float(resume_s),  # type: ignore[arg-type]
            **numbers,
        )


class Handshake:
    """The state machine of one side, without a socket: bytes in, bytes out.

    Attributes:
        terms: what the peer told, once it has.
        done: whether the handshake has succeeded.
        leftover: bytes behind the last handshake message; they are the first frames.
    """

    def __init__(self, name: str, token: str | None, secure: bool) -> None:
        self.name = name
        self.terms: Terms | None = None
        self.done = False
        self.leftover = b""
        self._token = token
        self._secure = secure
        self._buffer = bytearray()
        self._transcript = hashlib.sha256()

    def feed(self, data: bytes) -> bytes:
        """Takes bytes from the peer and returns what to send back.

        Raises:
            HandshakeError: if the two do not agree; `refusal` says what to tell the peer.
        """
        self._buffer += data
        replies = b""
        while not self.done and (taken := self._take()) is not None:
            replies += self._answer(*taken)
        if self.done:
            self.leftover = bytes(self._buffer)
        return replies

    def _take(self) -> tuple[Step, dict[str, Any], bytes] | None:
        """Cuts the next message off the buffer; None while it is incomplete."""
        start = bytes(self._buffer[: len(MAGIC)])
        if start != MAGIC[: len(start)]:
            hint = ""
            if start[:1] in (b"\x15", b"\x16"):
                hint = "; it speaks TLS and this side does not: give both sides certificates"
            raise HandshakeError(
                f"the peer does not speak this protocol (first bytes {start!r}){hint}"
            )
        if len(self._buffer) < _PREFACE.size:
            return None
        _, version, kind, _, length = _PREFACE.unpack_from(self._buffer)
        if version != VERSION and kind != Step.REFUSE:
            raise VersionError(
                f"the peer speaks protocol version {version}, this side ({self.name}) version "
                f"{VERSION}; install the same version of the software on both sides"
            )
        if length > _MAX_BODY_BYTES:
            raise HandshakeError(
                f"a handshake message of {length} bytes; {_MAX_BODY_BYTES} is most"
            )
        end = _PREFACE.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[:end])
        del self._buffer[:end]
        try:
            body = json.loads(message[_PREFACE.size :])
            step = Step(kind)
        except (ValueError, RecursionError) as error:
            raise HandshakeError(f"the peer sent a malformed handshake message: {error}") from error
        if not isinstance(body, dict):
            raise HandshakeError("the peer sent a handshake message that is no JSON object")
        if step is Step.REFUSE:
            self._refused(body, version)
        return step, body, message

    def _answer(self, step: Step, body: dict[str, Any], message: bytes) -> bytes:
        raise NotImplementedError

    def _refused(self, body: dict[str, Any], version: int) -> NoReturn:
        reason = str(body.get("reason", "no reason given"))[:1000]
        code = body.get("code")
        if code == "version" or version != VERSION:
            raise VersionError(f"the peer refused (it speaks protocol version {version}): {reason}")
        if code == "token":
            raise AuthenticationError(f"the peer refused: {reason}")
        raise HandshakeError(f"the peer refused: {reason}")

    def _message(self, step: Step, body: dict[str, Any]) -> bytes:
        message = _pack(step, body)
        self._transcript.update(message)
        return message

    def _proof(self, side: str) -> str:
        assert self._token is not None
        signed = side.encode() + b"\0" + self._transcript.digest()
        return hmac.new(self._token.encode(), signed, hashlib.sha256).hexdigest()

    def _check_proof(self, body: dict[str, Any], expected: str, who: str) -> None:
        proof = body.get("proof")
        if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), expected.encode()):
            raise AuthenticationError(
                f"{who} does not know this side's token; give both sides the same one"
            )

    def _unexpected(self, step: Step) -> NoReturn:
        raise HandshakeError(f"the peer sent {step.name} out of turn")


class ClientHandshake(Handshake):
    """The connecting side; `opening` is what to send first."""

    def __init__(self, terms: Terms, token: str | None, secure: bool) -> None:
        super().__init__(terms.name, token, secure)
        self._expected = Step.CHALLENGE
        body = terms.to_body() | {"nonce": secrets.token_hex(16), "token": token is not None}
        self.opening = self._message(Step.HELLO, body)

    def _answer(self, step: Step, body: dict[str, Any], message: bytes) -> bytes:
        if step is not self._expected:
            self._unexpected(step)
        if step is Step.CHALLENGE:
            if body.get("token") is not (self._token is not None):
                raise AuthenticationError(
                    "the peer asks for a token and this side has none"
                    if self._token is None
                    else "this side has a token and the peer has none; it may not be the right peer"
                )
            self._transcript.update(message)
            self._expected = Step.WELCOME
            proof = self._proof("connecting") if self._token is not None else None
            return self._message(Step.PROOF, {"proof": proof})
        self.terms = Terms.from_body(body)
        if self._token is not None:
            self._check_proof(body, self._proof("listening"), f"the listener {self.terms.name}")
        self.done = True
        return b""


class ServerHandshake(Handshake):
    """The listening side.

    Args:
        name: name of this side.
        token: the shared token, or None.
        secure: whether the connection is encrypted.
        admit: given what the peer told, returns this side's terms; raises HandshakeError to refuse.
    """

    def __init__(
        self, name: str, token: str | None, secure: bool, admit: Callable[[Terms], Terms]
    ) -> None:
        super().__init__(name, token, secure)
        self._admit = admit
        self._hello: Terms | None = None

    def _answer(self, step: Step, body: dict[str, Any], message: bytes) -> bytes:
        if self._hello is None:
            if step is not Step.HELLO:
                self._unexpected(step)
            self._hello = Terms.from_body(body)
            if body.get("token") is not (self._token is not None):
                raise AuthenticationError(
                    f"{self._hello.name} has no token and {self.name} asks for one"
                    if self._token is not None
                    else f"{self._hello.name} has a token and {self.name} has none"
                )
            self._transcript.update(message)
            challenge = {
                "name": self.name,
                "nonce": secrets.token_hex(16),
                "token": self._token is not None,
            }
            return self._message(Step.CHALLENGE, challenge)
        if step is not Step.PROOF:
            self._unexpected(step)
        if self._token is not None:
            self._check_proof(body, self._proof("connecting"), self._hello.name)
        self._transcript.update(message)
        welcome = self._admit(self._hello).to_body()
        if self._token is not None:
            welcome["proof"] = self._proof("listening")
        self.terms = self._hello
        self.done = True
        return self._message(Step.WELCOME, welcome)


def _pack(step: Step, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return _PREFACE.pack(MAGIC, VERSION, step, 0, len(data)) + data


def refusal(error: HandshakeError, name: str) -> bytes:
    """Returns the REFUSE message that tells the peer why; it names no secret."""
    code = "handshake"
    if isinstance(error, VersionError):
        code = "version"
    elif isinstance(error, AuthenticationError):
        code = "token"
    return _pack(Step.REFUSE, {"code": code, "reason": f"{name} says: {error}"[:1000]})
