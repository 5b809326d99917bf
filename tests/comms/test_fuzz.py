"""Whatever bytes a peer sends, in the handshake or behind it, end its own connection at most.

In one process and without sockets, so that a second brings thousands of cases; test_hostile.py has
the live server. A failure names the seed and the number of its case.
"""

from __future__ import annotations

import json
import random
import struct

import pytest

from comms import Allowance, ChannelOptions, CodecError, Limits
from comms.errors import BusyError, ChannelError, HandshakeError
from comms.wire.frame import MAGIC, VERSION
from comms.wire.greeting import GREETINGS, HandshakeStep, Terms
from comms.wire.handshake import ClientHandshake, ServerHandshake, refusal
from tests.comms.fuzzing import drive, mutate, pack, spoiled_json, valid_frames

QUICK, SOAK = 1000, 100_000
TOKEN = "a token for tests only"
PREFACE = struct.Struct("<4sHBBI")
LIMITS = Limits(message_bytes=1 << 18, control_bytes=1 << 14, join_bytes=1 << 10, bundle_tensors=8)
SMALL = Allowance(tensor_bytes=2000, bundle_bytes=2000, bundle_tensors=2, control_bytes=4000)


def exchange(token: str | None) -> tuple[list[bytes], list[bytes]]:
    """Returns what the connecting side and the listener say in a handshake that succeeds."""
    client = ClientHandshake(Terms(name="d0", session="0" * 32), token)
    server = ServerHandshake("server", token, lambda terms: terms)
    hello = client.opening
    challenge = server.feed(hello)
    proof = client.feed(challenge)
    welcome = server.feed(proof)
    client.feed(welcome)
    assert client.done and server.done
    refuse = refusal(HandshakeError("no"), "server")
    return [hello, proof, refuse], [challenge, welcome, refuse]


def spoil(rng: random.Random, message: bytes) -> bytes:
    """Returns a handshake message of which something is wrong, most of the time."""
    fields = list(PREFACE.unpack_from(message))
    body = message[PREFACE.size :]
    way = rng.randrange(6)
    if way <= 2:
        body = spoiled_json(rng, json.loads(body))
        fields[4] = len(body)
    elif way == 3:
        at = rng.randrange(1, 5)
        most = (1 << 16, 1 << 8, 1 << 8, 1 << 32)[at - 1]
        fields[at] = rng.choice((0, 1, 2, 5, 6, 4096, 4097, most - 1, rng.randrange(most))) % most
    elif way == 4:
        fields[2] = rng.choice(list(HandshakeStep))
    else:
        data = bytearray(message)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    return PREFACE.pack(*fields) + body


def shake(rng: random.Random, side: str) -> str:
    """Plays one handshake against a peer that spoils it; returns how it ended."""
    token = rng.choice((None, TOKEN))
    client_says, server_says = exchange(token)
    if side == "listening":
        ours = ServerHandshake("server", token, lambda terms: terms)
        script = client_says[:2]
    else:
        ours = ClientHandshake(Terms(name="d0", session="0" * 32), token)
        script = server_says[:2]
    if rng.random() < 0.3:
        script.insert(rng.randrange(3), rng.choice(client_says + server_says))
    at = rng.randrange(len(script))
    script[at] = spoil(rng, script[at])
    data = b"".join(script) + rng.randbytes(rng.randrange(3))
    try:
        while data and not ours.done:
            size = rng.choice((1, 7, 100, 5000))
            ours.feed(data[:size])
            data = data[size:]
    except (HandshakeError, BusyError) as error:
        line = str(error)
        assert len(line) < 2000 and line.isprintable(), line
        told = refusal(error, "server")
        assert len(told) <= PREFACE.size + 4096
        return "refused"
    return "done" if ours.done else "waiting"


def fuzz_handshake(side: str, cases: int) -> None:
    ends: dict[str, int] = {}
    for case in range(cases):
        rng = random.Random(f"{side} {case}")
        try:
            how = shake(rng, side)
        except Exception as error:
            raise AssertionError(f"handshake, {side}, case {case}: {error!r}") from error
        ends[how] = ends.get(how, 0) + 1
    assert ends["refused"] > 0.5 * cases, ends


def read(message) -> None:
    """Decodes what arrived, as a consumer does."""
    for payload in message.payloads.values() if message.kind != "control" else ():
        try:
            payload.check()
        except CodecError as error:
            assert "\n" not in str(error)
        else:  # what passes is decoded where nobody expects an error any more
            assert payload.array.nbytes <= LIMITS.message_bytes
    message.release()


def fuzz_frames(side: str, cases: int) -> None:
    options = ChannelOptions(limits=LIMITS, window_bytes=1 << 18, checksum=False)
    ends = {"lost": 0, "up": 0}
    for case in range(cases):
        rng = random.Random(f"{side} {case}")
        checked = rng.random() < 0.3
        stream = valid_frames(rng)
        victim = rng.randrange(len(stream))
        data = b"".join(pack(part, checked) for part in stream[:victim])
        data += mutate(rng, stream[victim], checked)
        data += b"".join(pack(part, checked) for part in stream[victim + 1 :])
        allowance = rng.choice((None, SMALL, Allowance.of(LIMITS), Allowance.of(LIMITS)))
        try:
            link = drive(
                options, data, dialled=side == "connecting", checked=checked, allowance=allowance,
                on_message=read, pieces=rng.choice((1 << 30, 1 << 30, 97)),
            )  # fmt: skip
            if link.error is not None:
                raise_cause(link.error)
                line = str(link.error)
                assert "d0 at there" in line and line.isprintable() and len(line) < 2000, line
            if allowance is None and side == "listening":
                stats = link.stats()
                assert stats.messages_in <= 1 and stats.raw_in_bytes <= LIMITS.join_bytes
        except Exception as error:
            raise AssertionError(f"frames, {side}, case {case}: {error!r}") from error
        ends["up" if link.error is None else "lost"] += 1
    assert min(ends.values()) > 0.05 * cases, ends


def raise_cause(error: BaseException) -> None:
    """A link that ended over what nothing expected holds it: that is what the fuzzer looks for."""
    cause = error.__cause__
    if cause is not None and not isinstance(cause, ChannelError):
        raise cause


SIDES = ("listening", "connecting")


@pytest.mark.parametrize("side", SIDES)
def test_a_handshake_withstands_a_thousand_peers(side):
    fuzz_handshake(side, QUICK)


@pytest.mark.parametrize("side", SIDES)
def test_a_link_withstands_a_thousand_peers(side):
    fuzz_frames(side, QUICK)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("side", SIDES)
def test_a_handshake_withstands_a_hundred_thousand_peers(side):
    fuzz_handshake(side, SOAK)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("side", SIDES)
def test_a_link_withstands_a_hundred_thousand_peers(side):
    fuzz_frames(side, SOAK)


def test_the_fuzzer_covers_every_message_and_finds_what_it_looks_for(monkeypatch):
    """Each kind is spoiled, and a check that is missing is found."""
    kinds = {PREFACE.unpack_from(message)[2] for says in exchange(TOKEN) for message in says}
    assert kinds == set(GREETINGS)
    assert PREFACE.unpack_from(exchange(None)[0][0])[:2] == (MAGIC, VERSION)
    with monkeypatch.context() as patch:
        patch.setattr("comms.link.signals.MAX_RATE", float("inf"))
        patch.setattr("comms.link.signals.STATUS", struct.Struct("<QQQ"))
        patch.setattr(
            "comms.link.pace.Pace.set_rate", lambda self, rate, now_s: struct.pack("<I", rate)
        )
        with pytest.raises(AssertionError, match="case"):
            fuzz_frames("listening", QUICK)
