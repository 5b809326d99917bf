"""Messages of the handshake: every field of every one, what it may hold and what it may not."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import time

import pytest

from comms import ConnectError, HandshakeError
from comms.errors import BusyError, VersionError
from comms.wire.frame import MAGIC, VERSION
from comms.wire.greeting import (
    CODE,
    COUNT,
    GREETINGS,
    NAME,
    PROOF,
    REASON,
    SECONDS,
    SESSION,
    TRUTH,
    HandshakeStep,
    Refuse,
    Terms,
    read_greeting,
)
from comms.wire.handshake import ClientHandshake, ServerHandshake, refusal
from tests.comms.conftest import tls
from tests.comms.fuzzing import TOKENS
from tests.patience import PATIENCE_S

PREFACE = struct.Struct("<4sHBBI")
TOKEN = "a token for tests only"
FIELDS = [(step, one.name) for step, kind in GREETINGS.items() for one in dataclasses.fields(kind)]
_TEXTS = ('"x"', f'"{"a" * 32}"', f'"{"g" * 32}"')
#: What each kind of field takes of the fuzzers' tokens, by what its rule says it expects.
TAKEN = {
    NAME.expected: (*_TEXTS, '"\\ud83d\\ude00"'),
    COUNT.expected: ("0", "1", "-0", str(2**31), str(2**32), str(2**53), str(2**62)),
    SECONDS.expected: ("0", "1", "-0", "0.0", "-0.0", "1.5", "1e-400"),
    TRUTH.expected: ("true", "false"),
    SESSION.expected: (f'"{"a" * 32}"',),
    f"{PROOF.expected}, or null": ("null",),
    CODE.expected: _TEXTS,
    REASON.expected: (
        *_TEXTS, '""', '"\\ud83d\\ude00"', '"\\u0000"', '"\\u001b[2J"', '"a\\nb"', '"\\u202e"',
    ),
}  # fmt: skip


def body_of(step: HandshakeStep) -> dict:
    """Returns the JSON of a message of a handshake that succeeds."""
    client = ClientHandshake(Terms(name="d0", session="0" * 32), TOKEN)
    server = ServerHandshake("server", TOKEN, lambda terms: terms)
    challenge = server.feed(client.opening)
    proof = client.feed(challenge)
    says = {
        HandshakeStep.HELLO: client.opening,
        HandshakeStep.CHALLENGE: challenge,
        HandshakeStep.PROOF: proof,
        HandshakeStep.WELCOME: server.feed(proof),
        HandshakeStep.REFUSE: refusal(HandshakeError("no"), "server"),
    }
    return json.loads(says[step][PREFACE.size :])


def deliver(step: HandshakeStep, data: bytes) -> None:
    """Feeds a message to the side that it is for, at the moment at which it is expected."""
    message = PREFACE.pack(MAGIC, VERSION, step, 0, len(data)) + data
    client = ClientHandshake(Terms(name="d0", session="0" * 32), TOKEN)
    server = ServerHandshake("server", TOKEN, lambda terms: terms)
    if step in (HandshakeStep.HELLO, HandshakeStep.PROOF):
        if step is HandshakeStep.PROOF:
            server.feed(client.opening)
        server.feed(message)
    else:
        if step is HandshakeStep.WELCOME:
            client.feed(server.feed(client.opening))
        client.feed(message)


def with_field(step: HandshakeStep, name: str, token: str) -> bytes:
    fields = {key: json.dumps(value) for key, value in body_of(step).items()} | {name: token}
    return ("{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in fields.items()) + "}").encode()


def test_every_step_has_its_message_and_every_field_its_rule():
    assert set(GREETINGS) == set(HandshakeStep)
    for kind in GREETINGS.values():
        for one in dataclasses.fields(kind):
            assert one.metadata["rule"].expected, one
    assert all(set(body_of(step)) == {one.name for one in dataclasses.fields(GREETINGS[step])}
               for step in HandshakeStep)  # fmt: skip


@pytest.mark.parametrize(("step", "name"), FIELDS, ids=lambda each: str(each))
def test_a_field_takes_what_it_may_hold_and_nothing_else(step, name):
    rule = {one.name: one for one in dataclasses.fields(GREETINGS[step])}[name].metadata["rule"]
    taken = []
    for token in TOKENS:
        try:
            value = getattr(read_greeting(step, with_field(step, name, token)), name)
        except HandshakeError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 700, line
        else:
            taken.append(token)
            assert not isinstance(value, str) or value.isprintable()
    assert sorted(taken) == sorted(TAKEN[rule.expected])


@pytest.mark.parametrize(("step", "name"), FIELDS, ids=lambda each: str(each))
def test_over_the_state_machines_a_wrong_field_is_a_handshake_error(step, name):
    """Whatever it is: no other exception comes out of either side."""
    for token in TOKENS:
        try:
            deliver(step, with_field(step, name, token))
        except (HandshakeError, BusyError):
            continue


@pytest.mark.parametrize(("step", "name"), FIELDS, ids=lambda each: str(each))
def test_a_field_that_is_missing_is_named(step, name):
    body = body_of(step)
    del body[name]
    with pytest.raises(HandshakeError, match=f"{step.name} has no {name}"):
        read_greeting(step, json.dumps(body).encode())


@pytest.mark.parametrize("step", list(HandshakeStep))
def test_a_field_too_many_is_named(step):
    body = body_of(step) | {"extra\n": 1}
    with pytest.raises(HandshakeError, match=rf"{step.name} has a field 'extra\?', expected only"):
        read_greeting(step, json.dumps(body).encode())


def test_the_packet_that_ended_a_run_is_refused():
    """An OverflowError once, out of the I/O thread: seconds of 401 digits."""
    with pytest.raises(HandshakeError, match="401 digits"):
        deliver(HandshakeStep.HELLO, with_field(HandshakeStep.HELLO, "resume_s", "1" + "0" * 400))
    with pytest.raises(HandshakeError, match="resume_s is 10000000000, expected seconds"):
        deliver(HandshakeStep.HELLO, with_field(HandshakeStep.HELLO, "resume_s", str(10**10)))


@pytest.mark.parametrize(
    "body", [{}, {"reason": 3}, {"reason": "a\x1b\nb"}, {"reason": "x" * 4000}]
)
def test_a_refusal_of_another_version_is_understood_as_far_as_it_goes(body):
    data = json.dumps(body).encode()
    client = ClientHandshake(Terms(name="d0", session="0" * 32), None)
    with pytest.raises(VersionError, match="version 77") as caught:
        client.feed(PREFACE.pack(MAGIC, 77, HandshakeStep.REFUSE, 0, len(data)) + data)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("code", ["version", "token", "busy", "handshake", "somethingelse"])
def test_a_refusal_is_told_as_what_it_is(code):
    kinds = {"busy": BusyError, "version": VersionError}
    data = json.dumps(Refuse(code=code, reason="for a reason").write()).encode()
    with pytest.raises(kinds.get(code, HandshakeError), match="for a reason"):
        deliver(HandshakeStep.REFUSE, data)


# -- resets at each moment ---------------------------------------------------------------------


def hang_up(sock: socket.socket, how: str) -> None:
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("how", ["reset", "end"])
@pytest.mark.parametrize("secure", [False, True])
def test_a_listener_survives_a_peer_that_leaves_at_any_moment(workshop, certificates, how, secure):
    files, _ = certificates
    server = workshop.endpoint("server", tls(files, "server") if secure else None)
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    opening = ClientHandshake(Terms(name="d0", session="0" * 32), None).opening
    if secure:
        opening = b"\x16\x03\x01\x00\xc4\x01\x00\x00\xc0\x03\x03" + bytes(200)
    for cut in range(0, len(opening) + 1, max(1, len(opening) // 24)):
        sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        sock.sendall(opening[:cut])
        hang_up(sock, how)
    client = workshop.endpoint("d1", tls(files) if secure else None)
    assert (
        client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S).peer
        == "server"
    )
    assert server.loop.failure is None
    until = time.monotonic() + PATIENCE_S
    while server.handshakes and time.monotonic() < until:
        time.sleep(0.02)
    assert server.handshakes == 0


@pytest.mark.parametrize("how", ["reset", "end"])
def test_a_connecting_side_survives_a_listener_that_leaves_at_any_moment(workshop, how):
    import threading

    server = ServerHandshake("server", None, lambda terms: terms)
    client_of_script = ClientHandshake(Terms(name="d0", session="0" * 32), None)
    challenge = server.feed(client_of_script.opening)
    data = challenge + server.feed(client_of_script.feed(challenge))
    cuts = list(range(0, len(data), max(1, len(data) // 12)))
    client = workshop.endpoint("d0")
    for cut in cuts:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer(listener=listener, cut=cut) -> None:
                sock, _ = listener.accept()
                sock.sendall(data[:cut])
                hang_up(sock, how)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises((ConnectError, HandshakeError)):
                client.connect(
                    "127.0.0.1", listener.getsockname()[1], name_of_peer="server", timeout_s=0.02
                )
            # It may have given up before it was answered at all.
            with socket.create_connection(listener.getsockname()):
                thread.join()
    assert client.loop.failure is None
