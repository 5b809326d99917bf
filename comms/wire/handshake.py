"""The handshake: identity, protocol version, token, and whether a stream is new or resumed.

Each message is a 12-byte preface, then JSON of at most 4 KiB::

    0  4  magic    the bytes PJXC
    4  2  version  version of the protocol
    6  1  kind     1 HELLO, 2 CHALLENGE, 3 PROOF, 4 WELCOME, 5 REFUSE
    7  1  zero
    8  4  length   bytes of JSON that follow

The JSON of each message is defined in ``comms.wire.greeting``. The connecting side sends HELLO, the
listener CHALLENGE, the connecting side PROOF, the listener WELCOME; either may send REFUSE instead
and close. This preface is the same in all versions, so that each side can tell the other which
version it needs. With a token, both sides prove it: a proof is HMAC-SHA256 of the token over the
side's name and every handshake byte before it, both sides' random numbers among them, so that
neither an old proof nor that of the other side can be reused. The connecting side proves itself
first, so that a scanner gets nothing against which it could test guesses.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from typing import NoReturn

from comms.errors import (
    AuthenticationError,
    BusyError,
    ChannelError,
    FrameError,
    HandshakeError,
    VersionError,
)
from comms.wire import bounded_json
from comms.wire.bounded_json import one_line, reason_text
from comms.wire.frame import MAGIC, VERSION
from comms.wire.greeting import (
    Challenge,
    Greeting,
    HandshakeStep,
    Hello,
    Proof,
    Refuse,
    Terms,
    Welcome,
    read_greeting,
)

_PREFACE = struct.Struct("<4sHBBI")
_MAX_BODY_BYTES = 4096


class Handshake:
    """The state machine of one side, without a socket: bytes in, bytes out.

    Args:
      name: Name of this side.
      token: The shared token, or None.

    Attributes:
      terms: Terms of the peer, once known.
      done: Whether the handshake has succeeded.
      leftover: Bytes after the last handshake message, the first frames.
      names: Names in the peer's certificate; None if it has shown none.
    """

    def __init__(self, name: str, token: str | None) -> None:
        self.name = name
        self.terms: Terms | None = None
        self.done = False
        self.leftover = b""
        self.names: tuple[str, ...] | None = None
        self._token = token
        self._buffer = bytearray()
        self._transcript = hashlib.sha256()

    def feed(self, data: bytes) -> bytes:
        """Processes bytes from the peer and returns the answer.

        Raises:
          HandshakeError: If the handshake failed; ``refusal`` returns the message for the peer.
          BusyError: If the peer cannot accept this side now.
        """
        self._buffer += data
        replies = b""
        while not self.done and (taken := self._take()) is not None:
            replies += self._answer(*taken)
        if self.done:
            self.leftover = bytes(self._buffer)
        return replies

    def _take(self) -> tuple[Greeting, bytes] | None:
        """Takes the next message from the buffer; None while it is incomplete."""
        start = bytes(self._buffer[: len(MAGIC)])
        if start != MAGIC[: len(start)]:
            hint = ""
            if start[:1] in (b"\x15", b"\x16"):
                hint = "; it uses TLS and this side does not: give both sides certificates"
            raise HandshakeError(
                f"the peer does not use this protocol (first bytes {start!r}){hint}"
            )
        if len(self._buffer) < _PREFACE.size:
            return None
        _, version, kind, zero, length = _PREFACE.unpack_from(self._buffer)
        if version != VERSION and kind != HandshakeStep.REFUSE:
            raise VersionError(
                f"the peer uses protocol version {version}, this side ({self.name}) version "
                f"{VERSION}; install the same version of the software on both sides"
            )
        if kind not in HandshakeStep.__members__.values() or zero:
            raise HandshakeError(f"the peer sent a handshake message of unknown kind {kind}")
        if length > _MAX_BODY_BYTES:
            raise HandshakeError(
                f"a handshake message of {length} bytes; at most {_MAX_BODY_BYTES} are accepted"
            )
        end = _PREFACE.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[:end])
        del self._buffer[:end]
        if version != VERSION:
            raise VersionError(
                f"the peer refused (it uses protocol version {version}): "
                f"{_foreign_reason(message[_PREFACE.size :])}"
            )
        greeting = read_greeting(HandshakeStep(kind), message[_PREFACE.size :])
        if isinstance(greeting, Refuse):
            _refused(greeting)
        return greeting, message

    def _answer(self, greeting: Greeting, message: bytes) -> bytes:
        raise NotImplementedError

    def _message(self, greeting: Greeting) -> bytes:
        message = _pack(greeting)
        self._transcript.update(message)
        return message

    def _proof(self, side: str) -> str | None:
        """Returns the proof of a side over all messages so far; None without a token."""
        if self._token is None:
            return None
        signed = side.encode() + b"\0" + self._transcript.digest()
        return hmac.new(self._token.encode(), signed, hashlib.sha256).hexdigest()

    def _check_proof(self, proof: str | None, side: str, who: str) -> None:
        expected = self._proof(side)
        if expected is not None and not hmac.compare_digest(proof or "", expected):
            raise AuthenticationError(
                f"{who} does not know this side's token; give both sides the same one"
            )

    def _check_name(self, name: str) -> None:
        """Checks that a peer with a certificate uses a name in it."""
        if self.names is not None and name not in self.names:
            known = ", ".join(one_line(name, 100) for name in self.names[:8]) or "no host"
            raise AuthenticationError(
                f"the peer's name is {name}, but its certificate names {known}; give each host a "
                "certificate whose subject alternative names include the host's name"
            )

    def _unexpected(self, greeting: Greeting) -> NoReturn:
        raise HandshakeError(f"the peer sent {greeting.step.name} out of order")


class ClientHandshake(Handshake):
    """The connecting side; ``opening`` is its first message.

    Args:
      terms: Terms of this side, including its name.
      token: The shared token, or None.
      expected: The required name of the listener; None accepts any.
    """

    def __init__(self, terms: Terms, token: str | None, expected: str | None = None) -> None:
        super().__init__(terms.name, token)
        self._expected = expected
        self._challenged = False
        hello = Hello(**terms.own(), nonce=secrets.token_hex(16), token=token is not None)
        self.opening = self._message(hello)

    def _answer(self, greeting: Greeting, message: bytes) -> bytes:
        if isinstance(greeting, Challenge) and not self._challenged:
            if greeting.token is not (self._token is not None):
                raise AuthenticationError(
                    "the peer requires a token and this side has none"
                    if self._token is None
                    else "this side has a token and the peer has none; it may be the wrong peer"
                )
            self._check_name(greeting.name)
            self._transcript.update(message)
            self._challenged = True
            return self._message(Proof(proof=self._proof("connecting")))
        if not isinstance(greeting, Welcome) or not self._challenged:
            self._unexpected(greeting)
        self._check_proof(greeting.proof, "listening", f"the listener {greeting.name}")
        self._check_name(greeting.name)
        if self._expected is not None and greeting.name != self._expected:
            raise HandshakeError(
                f"the listener's name is {greeting.name}, expected {self._expected}; check the "
                "address"
            )
        self.terms = greeting
        self.done = True
        return b""


class ServerHandshake(Handshake):
    """The listening side.

    Args:
      name: Name of this side.
      token: The shared token, or None.
      admit: Returns this side's terms for those of the peer; raises HandshakeError to refuse.
    """

    def __init__(self, name: str, token: str | None, admit: Callable[[Terms], Terms]) -> None:
        super().__init__(name, token)
        self._admit = admit
        self._hello: Hello | None = None

    def _answer(self, greeting: Greeting, message: bytes) -> bytes:
        if self._hello is None:
            if not isinstance(greeting, Hello):
                self._unexpected(greeting)
            if greeting.token is not (self._token is not None):
                raise AuthenticationError(
                    f"{greeting.name} has no token and {self.name} requires one"
                    if self._token is not None
                    else f"{greeting.name} has a token and {self.name} has none"
                )
            self._check_name(greeting.name)
            self._hello = greeting
            self._transcript.update(message)
            return self._message(
                Challenge(
                    name=self.name, nonce=secrets.token_hex(16), token=self._token is not None
                )
            )
        if not isinstance(greeting, Proof):
            self._unexpected(greeting)
        self._check_proof(greeting.proof, "connecting", self._hello.name)
        self._transcript.update(message)
        terms = self._admit(self._hello)
        welcome = self._message(Welcome(**terms.own(), proof=self._proof("listening")))
        self.terms = self._hello
        self.done = True
        return welcome


def _refused(refuse: Refuse) -> NoReturn:
    """Raises the error for a refusal of this protocol version."""
    if refuse.code == "version":
        raise VersionError(f"the peer refused: {refuse.reason}")
    if refuse.code == "token":
        raise AuthenticationError(f"the peer refused: {refuse.reason}")
    if refuse.code == "busy":
        raise BusyError(f"the peer cannot accept another connection now: {refuse.reason}")
    raise HandshakeError(f"the peer refused: {refuse.reason}")


def _foreign_reason(data: bytes) -> str:
    """Returns the reason of a peer of another protocol version, if it can be read."""
    try:
        reason = bounded_json.decode(data, "a refusal").get("reason")
    except FrameError:
        reason = None
    return one_line(reason) if isinstance(reason, str) else "no reason given"


def _pack(greeting: Greeting) -> bytes:
    data = bounded_json.encode(greeting.write(), greeting.step.name)
    return _PREFACE.pack(MAGIC, VERSION, greeting.step, 0, len(data)) + data


def refusal(error: ChannelError, name: str) -> bytes:
    """Returns a REFUSE message with the reason, which contains no secret."""
    codes = {VersionError: "version", AuthenticationError: "token", BusyError: "busy"}
    code = codes.get(type(error), "handshake")
    return _pack(Refuse(code=code, reason=reason_text(f"{name} says: {error}")))
