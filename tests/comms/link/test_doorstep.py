"""Unfinished connections: bounded by their address, the oldest loses, who loses hears why."""

from __future__ import annotations

import errno
import queue
import socket
import struct
import threading
import time

import pytest

from comms import ChannelOptions, ConnectError, Limits, PeerClosed, PeerLost
from comms.link.doorstep import Doorstep
from tests.comms.conftest import Collector, admitting, tls
from tests.patience import PATIENCE_S


class Caller:
    def __init__(self):
        self.error = None

    def turn_away(self, error):
        self.error = error


def test_the_oldest_of_an_address_loses_and_nobody_else():
    step = Doorstep(Limits(address_handshakes=3))
    other = Caller()
    step.enter(other, "192.0.2.9")
    callers = [Caller() for _ in range(10)]
    for caller in callers:
        step.enter(caller, "192.0.2.1")
    assert [caller.error is None for caller in callers] == [False] * 7 + [True] * 3
    assert other.error is None and len(step) == 4
    assert "more than 3 unfinished connections from 192.0.2.1" in str(callers[0].error)


def test_of_too_many_in_all_the_largest_crowd_loses():
    step = Doorstep(Limits(address_handshakes=50, pending_handshakes=20))
    few = [Caller() for _ in range(3)]
    for at, caller in enumerate(few):
        step.enter(caller, f"192.0.2.{at}")
    crowd = [Caller() for _ in range(40)]
    for caller in crowd:
        step.enter(caller, "192.0.2.99")
    assert all(caller.error is None for caller in few) and len(step) == 20


@pytest.mark.parametrize(("expected", "most"), [(0, 64), (10, 64), (32, 64), (33, 66), (500, 1000)])
def test_the_bound_follows_from_how_many_are_expected(expected, most):
    step = Doorstep(Limits())
    step.expected = expected
    assert step.most_of_address == most


def test_who_leaves_frees_the_place():
    step = Doorstep(Limits(address_handshakes=1))
    for _ in range(5):
        caller = Caller()
        step.enter(caller, "a")
        step.leave(caller)
        step.leave(caller)
        assert caller.error is None and len(step) == step.addresses == 0


def open_many(port, count):
    """Opens connections that say nothing."""
    socks = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socks.append(sock)
    return socks


@pytest.mark.parametrize("secure", [False, True])
def test_a_device_gets_in_beside_a_crowd_that_never_finishes(workshop, certificates, secure):
    files, _ = certificates
    server = workshop.endpoint("server", tls(files, "server") if secure else None)
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    socks = open_many(port, 300)
    client = workshop.endpoint("d0", tls(files) if secure else None)
    client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    assert links.get(timeout=PATIENCE_S).peer == "d0"
    assert len(server.reception.doorstep) <= 64
    for sock in socks:
        sock.close()


def test_who_is_turned_away_hears_the_cause(workshop):
    server = workshop.endpoint("server", ChannelOptions(limits=Limits(address_handshakes=1)))
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    first = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    until = time.monotonic() + PATIENCE_S
    while not len(server.reception.doorstep) and time.monotonic() < until:
        time.sleep(0.01)
    second = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    said = b""
    while data := first.recv(4096):
        said += data
    assert b'"busy"' in said and b"more than 1 unfinished connections from 127.0.0.1" in said
    first.close()
    second.close()


def test_a_device_that_is_turned_away_again_and_again_names_the_cause(workshop):
    """Its own tries never finish: the server's door is held shut by newcomers."""
    from comms.errors import BusyError
    from comms.link.pending_connection import PendingConnection

    server = workshop.endpoint("server")
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    server.reception.admit = None  # not to be reached
    exchange = PendingConnection._exchange

    def turn_away(self, events):
        if self in server.reception.openings:
            self.turn_away(BusyError("more than 64 unfinished connections from 127.0.0.1"))
        else:
            exchange(self, events)

    client = workshop.endpoint("d0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingConnection, "_exchange", turn_away)
        with pytest.raises(ConnectError, match=r"another connection now: .* more than"):
            client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=4.0)


ACCEPT_ERRORS = (
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPERM, errno.EOPNOTSUPP, errno.ECONNABORTED,
)  # fmt: skip


def test_no_error_of_accepting_ends_the_thread(workshop):
    """Systems report a newcomer's own troubles there, each with other numbers."""

    class Listener:
        def __init__(self, sock):
            self.sock, self.errors = sock, list(ACCEPT_ERRORS)

        def fileno(self):
            return self.sock.fileno()

        def accept(self):
            if self.errors:
                raise OSError(self.errors.pop(), "refused by a test")
            return self.sock.accept()

        def close(self):
            self.sock.close()

    server = workshop.endpoint("server")
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, links.put)
    made = []

    def replace():
        listener = Listener(server.reception.listeners[0])
        made.append(listener)
        server.loop.forget(listener.sock)
        server.reception.listeners[0] = listener
        for _ in range(len(ACCEPT_ERRORS) - 1):
            server.reception.accept(listener, None, links.put)
        server.reception.invite(listener, None, links.put)
        replaced.set()

    replaced = threading.Event()
    server.loop.post(replace)
    assert replaced.wait(PATIENCE_S)  # else the old listener may take the newcomer first
    client = workshop.endpoint("d0")
    client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    assert links.get(timeout=PATIENCE_S).peer == "d0"
    assert not made[0].errors and server.loop.failure is None


def test_a_reset_just_after_connecting_is_an_error_of_that_try_alone():
    from comms.link.pending_connection import PendingConnection
    from tests.comms.fuzzing import FakeLoop

    class Reset:
        setblocking = close = lambda *_: None

        def getsockopt(self, *_):
            return 0

        def getsockname(self):
            return "127.0.0.1", 1

        def getpeername(self):
            raise OSError(errno.ENOTCONN, "not connected")

    failed = []
    opening = PendingConnection(
        FakeLoop(), Reset(), None, tls=None, server_name=None, bind_names=False, deadline_s=1.0,
        on_done=failed.append, on_failed=lambda _, error: failed.append(error),
    )  # fmt: skip
    opening._connect_ended()
    assert len(failed) == 1 and isinstance(failed[0], ConnectError)
    opening._connect_ended()  # a stale event of the same turn
    opening._shake_hands(None)
    assert len(failed) == 1


def test_a_bug_over_one_newcomer_is_shown_and_ends_that_one_alone(workshop, monkeypatch):
    shown: queue.Queue = queue.Queue()
    monkeypatch.setattr("threading.excepthook", lambda args: shown.put(args.exc_value))
    server = workshop.endpoint("server")
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, links.put)
    admit = server.reception.admit

    def fail(hello):
        if hello.name == "d0":
            raise KeyError("a bug")
        return admit(hello)

    server.reception.admit = fail
    with pytest.raises(ConnectError, match="interrupted"):
        workshop.endpoint("d0").connect("127.0.0.1", port, name_of_peer="s", timeout_s=PATIENCE_S)
    error = shown.get(timeout=PATIENCE_S)
    assert "KeyError: 'a bug' at test_doorstep.py:" in str(error)
    workshop.endpoint("d1").connect("127.0.0.1", port, name_of_peer="s", timeout_s=PATIENCE_S)
    assert links.get(timeout=PATIENCE_S).peer == "d1"


def test_links_that_nobody_admits_count_as_unfinished(workshop):
    """A handshake alone holds no place: the oldest link loses, and both its ends hear why."""
    server = workshop.endpoint("server", ChannelOptions(limits=Limits(address_handshakes=2)))
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, links.put)
    client = workshop.endpoint("d0")

    def connect():
        up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
        return Collector(links.get(timeout=PATIENCE_S)), Collector(up)

    down, up = connect()
    admitted, _ = connect()
    admitted.link.admit()
    connect()
    connect()
    assert "unfinished connections" in str(up.take_lost()) and down.link.wait_closed(PATIENCE_S)
    assert "unfinished connections" in str(down.take_lost())
    assert isinstance(down.link.error, PeerLost) and not isinstance(down.link.error, PeerClosed)
    assert admitted.link.error is None


def test_newcomers_of_one_turn_do_not_evict_who_was_just_admitted(workshop):
    """Many are accepted in a turn of the I/O thread, which learns of admissions after it."""
    server = workshop.endpoint("server", ChannelOptions(limits=Limits(address_handshakes=2)))
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, links.put)
    client = workshop.endpoint("d0")
    up = Collector(client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S))
    down = Collector(links.get(timeout=PATIENCE_S))
    socks, counts = [], queue.Queue()

    def crowd():
        down.link.admit()
        socks.extend(open_many(port, 4))
        server.reception.accept(server.reception.listeners[0], None, links.put)
        counts.put(len(server.reception.doorstep))

    server.loop.post(crowd)
    assert counts.get(timeout=PATIENCE_S) == 2
    assert down.link.error is None and up.link.error is None
    for sock in socks:
        sock.close()
