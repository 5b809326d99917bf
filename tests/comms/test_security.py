"""Who may talk: versions, tokens, certificates, and what strangers can and cannot do."""

from __future__ import annotations

import itertools
import json
import queue
import socket
import struct
import threading
import time

import numpy as np
import pytest

from comms import (
    AuthenticationError,
    ChannelError,
    ChannelOptions,
    ConnectError,
    HandshakeError,
    Limits,
    Role,
    Tag,
    TlsOptions,
    VersionError,
)
from comms.wire.frame import MAGIC, VERSION
from comms.wire.greeting import Hello, Terms
from comms.wire.handshake import ClientHandshake, ServerHandshake
from tests.comms.conftest import admitting, tls
from tests.patience import PATIENCE_S

TOKEN = "correct horse battery staple"
PREFACE = struct.Struct("<4sHBBI")


def connect(workshop, port, options=None, timeout_s=PATIENCE_S):
    client = workshop.endpoint("client", options)
    return client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=timeout_s)


def listen(workshop, options=None, name="server"):
    links: queue.Queue = queue.Queue()
    _, port = workshop.endpoint(name, options).listen("127.0.0.1", 0, admitting(links.put))
    return port, links


def exchange_one(workshop, options, client_options=None):
    pair = workshop.pair(options, client_options=client_options)
    array = np.arange(300_000, dtype=np.float32)
    pair.up.send(Tag(role=Role.ACTIVATION), array)
    pair.down.send(Tag(role=Role.COTANGENT), array)
    np.testing.assert_array_equal(pair.at_server.take_array(), array)
    np.testing.assert_array_equal(pair.at_client.take_array(), array)


def test_the_same_token_on_both_sides_is_accepted(workshop):
    exchange_one(workshop, ChannelOptions(token=TOKEN))


@pytest.mark.parametrize(
    ("at_server", "at_client", "match"),
    [
        (TOKEN, "another token entirely", "does not know this side's token"),
        (TOKEN, None, "requires (a token|one)"),
        (None, TOKEN, "has none"),
    ],
)
def test_other_tokens_are_refused_and_no_link_appears(
    workshop, at_server, at_client, match, within
):
    port, links = listen(workshop, ChannelOptions(token=at_server))
    with within(5.0), pytest.raises(AuthenticationError, match=match):
        connect(workshop, port, ChannelOptions(token=at_client), timeout_s=PATIENCE_S)
    assert links.empty()


def test_a_listener_that_does_not_know_the_token_is_refused():
    """A false listener can ask for the proof but cannot give its own."""
    client = ClientHandshake(Terms(name="c", session="a" * 32), TOKEN)
    false = ServerHandshake("s", "not the right token", lambda terms: terms)
    false._check_proof = lambda *_: None  # it lets anyone in
    reply = client.feed(false.feed(client.opening))
    with pytest.raises(AuthenticationError, match="listener"):
        client.feed(false.feed(reply))
    assert not client.done


def test_a_recorded_proof_is_worth_nothing(workshop):
    def shake(server, client):
        challenge = server.feed(client.opening)
        proof = client.feed(challenge)
        return proof, server.feed(proof)

    def make_server():
        return ServerHandshake("s", TOKEN, lambda terms: terms)

    client = ClientHandshake(Terms(name="c", session="a" * 32), TOKEN)
    recorded, welcome = shake(make_server(), client)
    client.feed(welcome)
    assert client.done
    replayed = make_server()
    replayed.feed(client.opening)
    with pytest.raises(AuthenticationError):
        replayed.feed(recorded)


def test_the_handshake_works_a_byte_at_a_time_and_keeps_what_follows():
    client = ClientHandshake(Terms(name="c", session="a" * 32), TOKEN)
    server = ServerHandshake("s", TOKEN, lambda terms: terms)
    to_server, to_client = client.opening, b""
    while not (client.done and server.done):
        for byte in to_server:
            to_client += server.feed(bytes([byte]))
        to_server = b""
        if server.done:
            to_client += b"frames"
            to_server += client.feed(to_client)
            break
        for byte in to_client:
            to_server += client.feed(bytes([byte]))
        to_client = b""
    assert client.done and client.leftover == b"frames"
    assert server.terms.name == "c"


@pytest.mark.parametrize("version", [0, VERSION + 1, 65535])
def test_another_version_is_refused_naming_both(workshop, version):
    port, links = listen(workshop)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(PREFACE.pack(MAGIC, version, 1, 0, 2) + b"{}")
        sock.settimeout(PATIENCE_S)
        reply = b"".join(iter(lambda: sock.recv(4096), b""))
    magic, spoken, kind, _, _ = PREFACE.unpack_from(reply)
    assert (magic, spoken, kind) == (MAGIC, VERSION, 5)
    text = reply[PREFACE.size :].decode()
    assert f"version {version}" in text and f"version {VERSION}" in text
    assert links.empty()


def test_a_listener_of_another_version_is_told_clearly(workshop):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(4096)
                body = b'{"code": "version", "reason": "server speaks version 9"}'
                sock.sendall(PREFACE.pack(MAGIC, 9, 5, 0, len(body)) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(VersionError, match="protocol version 9"):
            connect(workshop, server.getsockname()[1], timeout_s=PATIENCE_S)
        thread.join()


def test_beyond_loopback_a_token_is_asked_for(workshop):
    endpoint = workshop.endpoint("server")
    with pytest.raises(ChannelError, match=r"ChannelOptions\.token .* listen_openly=True"):
        endpoint.listen("0.0.0.0", 0, lambda link: None)
    for options in (ChannelOptions(token=TOKEN), ChannelOptions(listen_openly=True)):
        workshop.endpoint("server", options).listen("0.0.0.0", 0, lambda link: None)


def test_a_short_token_is_refused():
    with pytest.raises(ChannelError, match="at least 8"):
        ChannelOptions(token="short")
    assert TOKEN not in repr(ChannelOptions(token=TOKEN))


# -- TLS --------------------------------------------------------------------------------------


def test_tls_carries_tensors_and_is_version_1_3(workshop, certificates):
    files, _ = certificates
    exchange_one(workshop, tls(files, "server"), tls(files))
    server, client = workshop.endpoints
    assert server.links[0].stream.transport.socket.version() == "TLSv1.3"
    assert client.links[0].stream.transport.secure


def test_large_and_small_tensors_cross_tls_both_ways_at_once(workshop, certificates):
    """More than the kernel takes at a time, so that records are cut off and begun again."""
    files, _ = certificates
    pair = workshop.pair(tls(files, "server"), client_options=tls(files))
    sizes = (4_000_003, 1, 70_000, 0, 9_000_000, 16_383, 16_384, 5_000_000)
    arrays = [np.random.default_rng(size).integers(0, 255, size, np.uint8) for size in sizes]
    for array in arrays:
        pair.up.send(Tag(role=Role.ACTIVATION), array)
        pair.down.send(Tag(role=Role.COTANGENT), array)
    for array in arrays:
        np.testing.assert_array_equal(pair.at_server.take_array(), array)
        np.testing.assert_array_equal(pair.at_client.take_array(), array)


def test_mutual_tls_with_token(workshop, certificates):
    files, _ = certificates
    server = ChannelOptions(token=TOKEN, tls=tls(files, "server", require_peer=True).tls)
    client = ChannelOptions(token=TOKEN, tls=tls(files, "d0").tls)
    exchange_one(workshop, server, client)


def test_a_device_without_the_right_certificate_is_refused(workshop, certificates):
    files, stranger = certificates
    port, links = listen(workshop, tls(files, "server", require_peer=True))
    foreign = TlsOptions(
        authority=files.authority,
        certificate=stranger.certificate("d0"),
        key=stranger.key("d0"),
    )
    for options in (tls(files), ChannelOptions(tls=foreign)):
        with pytest.raises(ChannelError, match=r"handshake|certificate"):
            connect(workshop, port, options, timeout_s=5)
    assert links.empty()


@pytest.mark.parametrize(
    ("name", "match"),
    [("expired", "certificate has expired"), ("elsewhere", "certificate is not valid for")],
)
def test_a_listener_with_the_wrong_certificate_is_refused(
    workshop, certificates, name, match, within
):
    files, _ = certificates
    port, links = listen(workshop, tls(files, name))
    if name == "expired":
        time.sleep(1.1)
    with within(5.0), pytest.raises(AuthenticationError, match=match):
        connect(workshop, port, tls(files), timeout_s=PATIENCE_S)
    assert links.empty()


def test_an_unknown_authority_is_refused(workshop, certificates):
    files, stranger = certificates
    port, _ = listen(workshop, tls(files, "server"))
    with pytest.raises(AuthenticationError, match="certificate"):
        connect(workshop, port, tls(stranger), timeout_s=PATIENCE_S)


def test_plain_text_to_tls_and_tls_to_plain_text_end_quickly(workshop, certificates, within):
    files, _ = certificates
    for server, client in ((tls(files, "server"), None), (None, tls(files))):
        port, links = listen(workshop, server)
        with within(5.0), pytest.raises((ConnectError, HandshakeError), match="TLS"):
            connect(workshop, port, client, timeout_s=PATIENCE_S)
        assert links.empty()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ChannelError, match="cannot load the TLS files"):
        TlsOptions(authority=tmp_path / "none.pem").client_context()
    with pytest.raises(ChannelError, match="needs a certificate"):
        TlsOptions().server_context()


def test_a_tls_stream_resumes_after_cuts(workshop, certificates):
    from tests.comms.test_resume import exchange

    files, _ = certificates
    options = ChannelOptions(
        deadline_s=1.0, resume_s=20.0, replay_bytes=1 << 20, window_bytes=1 << 22,
        tls=tls(files, "server").tls, token=TOKEN,
    )  # fmt: skip
    exchange(workshop, ["close", "reset", "stale"], rounds=15, seed=4, options=options, least=3000)


# -- strangers --------------------------------------------------------------------------------


def serve_honestly(workshop, port, server_links):
    """A link works beside whatever strangers do."""
    link = connect(workshop, port)
    messages: queue.Queue = queue.Queue()
    server_links.get(timeout=PATIENCE_S).start(messages.put, lambda: None, lambda error: None)
    link.send(Tag(role=Role.ACTIVATION), np.arange(10))
    message = messages.get(timeout=PATIENCE_S)
    assert message.array.tolist() == list(range(10))
    message.release()


def hello(**fields: object) -> bytes:
    """Returns a HELLO, with some of its fields as given."""
    greeting = Hello(name="d0", session="0" * 32, nonce="0" * 32, token=False)
    body = json.dumps(greeting.write() | fields).encode()
    return PREFACE.pack(MAGIC, VERSION, 1, 0, len(body)) + body


def test_slow_loris_is_cut_off_and_harms_nobody(workshop):
    options = ChannelOptions(deadline_s=5.0, limits=Limits(pending_handshakes=20))
    port, links = listen(workshop, options)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
    began = time.monotonic()
    serve_honestly(workshop, port, links)
    hello = PREFACE.pack(MAGIC, VERSION, 1, 0, 4000)
    open_socks = list(socks)
    for index in itertools.count():
        for sock in list(open_socks):
            try:
                sock.send(hello[index % len(hello) : index % len(hello) + 1])
            except OSError:
                open_socks.remove(sock)
        if not open_socks or time.monotonic() - began > PATIENCE_S:
            break
        time.sleep(0.05)
    assert not open_socks
    for sock in socks:
        sock.close()


def test_a_crowd_of_half_open_handshakes_is_bounded(workshop):
    options = ChannelOptions(deadline_s=2.0, limits=Limits(pending_handshakes=8))
    server = workshop.endpoint("server", options)
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    time.sleep(0.3)
    counts: queue.Queue = queue.Queue()
    server.loop.post(lambda: counts.put(server.handshakes))  # between two that it accepts
    assert counts.get(timeout=PATIENCE_S) <= 8
    for sock in socks:
        sock.close()


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\x00" * 64,
        PREFACE.pack(MAGIC, VERSION, 1, 0, 1 << 31),
        PREFACE.pack(MAGIC, VERSION, 1, 0, 3) + b"[1]",
        PREFACE.pack(MAGIC, VERSION, 1, 0, 4) + b"\xff\xfe\x00{",
        PREFACE.pack(MAGIC, VERSION, 77, 0, 2) + b"{}",
        PREFACE.pack(MAGIC, VERSION, 3, 0, 2) + b"{}",
        PREFACE.pack(MAGIC, VERSION, 1, 0, 4000) + b"[" * 4000,
        PREFACE.pack(MAGIC, VERSION, 1, 0, 2) + b"{}",
        hello(resume_s=10**400),
        hello(received=-1),
        hello() + PREFACE.pack(MAGIC, VERSION, 3, 0, 20) + b'{"proof": "\\ud800x"}',
    ],
)
def test_what_is_no_hello_is_shown_the_door(workshop, opening):
    port, links = listen(workshop)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(opening)
        sock.settimeout(PATIENCE_S)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert links.empty()
    serve_honestly(workshop, port, links)
