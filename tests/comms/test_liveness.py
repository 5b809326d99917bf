"""Lost, silent and late peers: everyone hears of it in time, and nothing hangs."""

from __future__ import annotations

import queue
import socket
import threading
import time

import numpy as np
import pytest

from comms import ChannelError, ChannelOptions, ConnectError, PeerClosed, PeerLost, Role, Tag
from tests.comms.conftest import admitting
from tests.patience import PATIENCE_S

#: What a busy machine may add; well below the deadline that most of these tests leave as it is.
BUSY_S = 5.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_an_unreachable_listener_is_named_within_the_timeout(workshop, within):
    client, port = workshop.endpoint("client"), free_port()
    expected = rf"cannot reach the server at 127\.0\.0\.1 port {port}"
    with within(0.5 + BUSY_S), pytest.raises(ConnectError, match=expected):
        client.connect("127.0.0.1", port, name_of_peer="the server", timeout_s=0.5)


def test_a_listener_may_start_late(workshop):
    client, port = workshop.endpoint("client"), free_port()
    links: queue.Queue = queue.Queue()

    def listen() -> None:
        workshop.endpoint("server").listen("127.0.0.1", port, links.put)

    timer = threading.Timer(0.4, listen)
    timer.start()
    link = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    timer.join()
    assert link.peer == "server" and links.get(timeout=PATIENCE_S).peer == "client"


def test_a_name_that_does_not_resolve_is_named(workshop):
    with pytest.raises(ConnectError, match="cannot look up"):
        workshop.endpoint("client").connect("name.invalid", 1, name_of_peer="server", timeout_s=0.1)


def test_a_port_in_use_is_named(workshop):
    _, port = workshop.endpoint("server").listen("127.0.0.1", 0, lambda link: None)
    with pytest.raises(ConnectError, match=f"cannot listen on 127.0.0.1 port {port}"):
        workshop.endpoint("other").listen("127.0.0.1", port, lambda link: None)


def test_a_goodbye_is_heard_at_once(workshop, within):
    pair = workshop.pair()
    with within(BUSY_S):
        pair.client.close()
        error = pair.at_server.take_lost()
    assert isinstance(error, PeerClosed) and "d0" in str(error)
    with pytest.raises(PeerLost):
        pair.down.send(Tag(role=Role.ACTIVATION), np.zeros(1))


def test_what_was_sent_before_close_still_arrives(workshop, monkeypatch):
    monkeypatch.setattr("comms.link.stream.LINGER_S", PATIENCE_S)
    pair = workshop.pair()
    array = np.arange(1 << 20)
    pair.up.send(Tag(role=Role.ACTIVATION), array)
    pair.up.send_control({"last": True})
    pair.up.close()
    kinds = {pair.at_server.take().kind for _ in range(2)}
    assert kinds == {"tensor", "control"}


def test_a_dead_connection_is_heard_at_once(workshop, within):
    pair = workshop.pair()
    with within(BUSY_S):
        # What the kernel does when a process is killed.
        pair.client.loop.post(lambda: pair.up.stream.transport.socket.shutdown(socket.SHUT_RDWR))
        assert "d0" in str(pair.at_server.take_lost())
        assert "server" in str(pair.at_client.take_lost())


class DeafPeer:
    """Finishes the handshake and then neither reads nor writes."""

    def __init__(self, port: int, token: str | None = None) -> None:
        from comms.wire.greeting import Terms
        from comms.wire.handshake import ClientHandshake

        self.socket = socket.create_connection(("127.0.0.1", port))
        terms = Terms(name="deaf", session="0" * 32, window_bytes=1 << 40)
        handshake = ClientHandshake(terms, token)
        self.socket.sendall(handshake.opening)
        while not handshake.done:
            data = self.socket.recv(4096)
            assert data, "the server has given up"
            self.socket.sendall(handshake.feed(data))


def test_a_silent_peer_is_lost_within_the_deadline(workshop, within):
    server = workshop.endpoint("server", ChannelOptions(deadline_s=3.0, checksum=False))
    links: queue.Queue = queue.Queue()
    lost: queue.Queue = queue.Queue()

    def on_link(link):
        link.start(lambda message: None, lambda: None, lost.put)
        links.put(link)

    _, port = server.listen("127.0.0.1", 0, admitting(on_link))
    began = time.monotonic()
    with DeafPeer(port).socket, within(3.0 + BUSY_S):
        error = lost.get(timeout=PATIENCE_S)
    assert "has sent nothing for" in str(error) and "deadline is 3 s" in str(error)
    assert time.monotonic() - began > 1.5


def test_a_peer_that_stops_reading_is_lost_within_the_deadline(workshop, quiet):
    server = workshop.endpoint("server", ChannelOptions(deadline_s=3.0, checksum=False))
    links: queue.Queue = queue.Queue()
    lost: queue.Queue = queue.Queue()

    def on_link(link):
        link.start(lambda message: None, lambda: None, lost.put)
        links.put(link)

    _, port = server.listen("127.0.0.1", 0, admitting(on_link))
    from comms.wire.frame import PING, Header, Kind, pack_header

    with DeafPeer(port).socket as sock:
        links.get(timeout=PATIENCE_S).send(Tag(role=Role.ACTIVATION), np.zeros(64 << 20, np.uint8))
        began = time.monotonic()
        while lost.empty() and time.monotonic() - began < PATIENCE_S:
            # It still sends heartbeats: only the bytes that it does not take give it away.
            ping = Header(kind=Kind.PING, length=PING.size, total=PING.size)
            try:
                sock.sendall(pack_header(ping) + PING.pack(time.monotonic()))
            except OSError:
                break
            time.sleep(0.05)
        assert not quiet or time.monotonic() - began < 3.0 + BUSY_S
    error = str(lost.get(timeout=PATIENCE_S))
    # Without heartbeats, where this thread was held up, it is silent as well.
    assert "has accepted no bytes for" in error or (not quiet and "has sent nothing for" in error)


def test_a_quiet_link_stays_up(workshop, quiet):
    deadline_s = 2.5 if quiet else 5.0
    pair = workshop.pair(ChannelOptions(deadline_s=deadline_s))
    time.sleep(1.2 * deadline_s)
    assert pair.up.error is None and pair.down.error is None
    pair.up.send(Tag(role=Role.ACTIVATION), np.ones(3))
    assert (pair.at_server.take_array() == 1).all()


def test_drain_waits_for_what_was_sent_and_says_when_it_cannot(workshop):
    pair = workshop.pair(ChannelOptions(window_bytes=100), hold=True)
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(1000, np.uint8))
    pair.up.drain(PATIENCE_S)
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(1000, np.uint8))
    with pytest.raises(ChannelError, match="1000 bytes are waiting"):
        pair.up.drain(0.2)
    pair.at_server.take().release()
    pair.up.drain(PATIENCE_S)


def test_an_error_in_a_callback_ends_that_link_alone_and_is_told(workshop):
    server, client = workshop.endpoint("server"), workshop.endpoint("client")
    links: queue.Queue = queue.Queue()
    lost: queue.Queue = queue.Queue()

    def fail(message):
        raise RuntimeError("a bug of the caller")

    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    links.get(timeout=PATIENCE_S).start(fail, lambda: None, lost.put)
    up.send_control({})
    error = lost.get(timeout=PATIENCE_S)
    assert "a bug of the caller" in str(error) and isinstance(error.__cause__, RuntimeError)
    assert "test_liveness.py:" in str(error) and "client" in str(error)
    # It is that link's alone: others go on, new ones come.
    assert server.loop.failure is None
    other = workshop.endpoint("other").connect(
        "127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S
    )
    messages: queue.Queue = queue.Queue()
    links.get(timeout=PATIENCE_S).start(messages.put, lambda: None, lost.put)
    other.send_control({"still": "works"})
    assert messages.get(timeout=PATIENCE_S).body == {"still": "works"}


def test_connect_and_drain_refuse_the_io_thread(workshop):
    pair = workshop.pair()
    found: queue.Queue = queue.Queue()

    def inside() -> None:
        for call in (
            lambda: pair.client.connect("127.0.0.1", 1, name_of_peer="x", timeout_s=1),
            lambda: pair.up.drain(1),
        ):
            try:
                call()
            except ChannelError as error:
                found.put(str(error))

    pair.client.loop.post(inside)
    assert "would block the I/O thread" in found.get(timeout=PATIENCE_S)
    assert "would block the I/O thread" in found.get(timeout=PATIENCE_S)
