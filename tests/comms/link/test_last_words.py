"""The end of a link: its reason arrives, nothing follows it, and what did not leave is known."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from comms import LinkShape, PeerClosed, PeerLost, Role, Tag
from comms.link.connection import Connection
from comms.link.outbox import Outbox
from comms.link.send_queue import SendQueue
from comms.wire.event_loop import READ
from comms.wire.transport import ConnectionEnded, TlsTransport, for_transports
from tests.comms.conftest import tls
from tests.patience import PATIENCE_S


class Socket:
    """A transport that takes everything, or nothing any more."""

    def __init__(self, *, broken=False):
        self.broken, self.sent = broken, 0

    def send(self, buffers):
        if self.broken:
            raise ConnectionEnded("sending failed: broken pipe")
        self.sent += len(buffers)
        return sum(map(len, buffers))


def outbox(**options):
    queue = SendQueue(1 << 20, lambda: None)
    return Outbox(queue, lambda: b"status", **{"keep": False, "replay_bytes": 1 << 20, **options})


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_follows_a_goodbye(keep):
    """The peer has shut its side by then: its reset would destroy the reason."""
    made, wire = outbox(keep=keep), Socket()
    made.ping_due = made.status_due = True
    made.pongs.append((0.0, 0.0))
    made.say_goodbye(b"{}")
    assert made.owes_goodbye
    made.flush(wire, 1 << 20)
    told = wire.sent
    assert told and not made.owes_goodbye
    made.ping_due = made.status_due = True
    made.pongs.append((0.0, 0.0))
    made.say_goodbye(b"{}")  # it has been said
    made.flush(wire, 1 << 20)
    assert wire.sent == told and not made.owes_goodbye and made.empty


def test_a_goodbye_that_waits_in_an_emulated_link_survives_a_second_refusal():
    made, wire = outbox(), Socket()
    made.set_shape(LinkShape(None, 0.05), time.monotonic())
    for _ in range(2):
        made.drop_waiting()
        made.say_goodbye(b"{}")
        made.flush(wire, 1 << 20)
    assert not wire.sent and not made.empty
    until_s = time.monotonic() + PATIENCE_S
    while not made.empty and time.monotonic() < until_s:
        made.flush(wire, 1 << 20)
    assert wire.sent == 1 and not made.owes_goodbye


class Inbox:
    """Has parts of what arrived, the last of which is the peer's goodbye."""

    def __init__(self, parts):
        self.parts, self.heard = parts, None

    def pump(self, transport, budget):
        self.parts -= 1
        if self.parts == 0:
            self.heard()
        if self.parts < 0:
            raise ConnectionEnded("the peer ended the connection")
        return True

    def settle(self):
        """Holds nothing."""


class Loop:
    def __getattr__(self, name):
        return lambda *of: None


@pytest.mark.parametrize("events", [0, READ])
@pytest.mark.parametrize("parts", [0, 1, 2, 5])
def test_the_peers_reason_is_read_although_it_takes_no_more(parts, events):
    inbox, ended = Inbox(parts), []
    made = outbox()
    made.status_due = True
    arrivals = type("Arrivals", (), {"paused": False})()
    connection = Connection(
        inbox, made, arrivals, None, Loop(), on_read=lambda: None, on_written=lambda: None,
        on_error=ended.append,
    )  # fmt: skip
    inbox.heard = lambda: setattr(connection, "transport", None)
    connection.transport = Socket(broken=True)
    connection.run(events)
    if parts:  # the goodbye was heard, and has ended the link with its reason
        assert connection.transport is None and not ended
    else:
        assert len(ended) == 1 and isinstance(ended[0], ConnectionEnded)


SLOW = LinkShape(0.05)


def test_who_has_to_hurry_gives_its_reason_nevertheless(workshop, monkeypatch):
    monkeypatch.setattr("comms.link.stream.LINGER_S", 0.2)
    pair = workshop.pair(shape=SLOW)
    pair.up.send(Tag(role=Role.ACTIVATION), np.zeros(1 << 18))
    pair.up.close("it is late")
    error = pair.at_server.take_lost()
    assert isinstance(error, PeerClosed) and "it is late" in str(error)


def test_draining_a_link_that_was_lost_says_so_if_something_had_not_left(workshop):
    pair = workshop.pair(shape=SLOW)
    pair.up.send_bundle("weights", {"w": np.zeros(1 << 18)}, {})
    found = []

    def drain():
        try:
            pair.up.drain(PATIENCE_S)
        except PeerLost as error:
            found.append(error)

    thread = threading.Thread(target=drain)
    thread.start()
    pair.down.refuse("enough")
    thread.join(PATIENCE_S)
    assert len(found) == 1 and "enough" in str(found[0])


@pytest.mark.parametrize("secure", [False, True])
def test_draining_a_link_that_has_said_all_is_right_although_it_ends(
    workshop, certificates, secure
):
    """Under TLS as well, whose keys outlive the end of sending: the other side may go on."""
    options = (
        (tls(certificates[0], "server"), tls(certificates[0], "d0")) if secure else (None,) * 2
    )
    pair = workshop.pair(options[0], client_options=options[1])
    pair.up.send_control({"last": True})
    assert pair.at_server.take().body == {"last": True}
    pair.up.drain(PATIENCE_S)
    pair.down.close("that is all")
    assert "that is all" in str(pair.at_client.take_lost())
    pair.up.drain(PATIENCE_S)


def test_under_tls_what_arrives_after_ones_own_end_of_sending_can_be_read(certificates):
    files, _ = certificates
    near, far = socket.socketpair()
    here = TlsTransport(near, for_transports(tls(files, "server").tls.server_context()), None)
    context = for_transports(tls(files, "d0").tls.client_context())
    there = TlsTransport(far, context, "127.0.0.1")
    waiting = [here, there]
    while waiting:
        waiting = [one for one in waiting if one.handshake() is not None]
    here.shut()
    assert there.send([memoryview(b"still here")]) == 10
    room = bytearray(20)
    assert here.receive(memoryview(room)) == 10 and room.startswith(b"still here")
    for one in (here, there):
        one.close()
