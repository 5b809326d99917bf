"""With mutual TLS a peer goes by no name but those that its certificate has."""

from __future__ import annotations

import itertools
import queue
import socket

import pytest

from comms import AuthenticationError, ChannelOptions, HandshakeError
from tests.comms.conftest import admitting, tls
from tests.patience import PATIENCE_S

HOSTS = ("server", "n1", "n2", "d0", "d1")
LISTENERS = ("server", "n1", "n2")


def meet(workshop, listener, dialler, *, resume_s=0.0):
    """Connects two hosts, each (name, certificate, whose names) and returns both links."""
    (name, files, shown), (peer, peer_files, peer_shown) = listener, dialler
    server = workshop.endpoint(
        name, ChannelOptions(tls=tls(files, shown, require_peer=True).tls, resume_s=resume_s)
    )
    client = workshop.endpoint(
        peer, ChannelOptions(tls=tls(peer_files, peer_shown).tls, resume_s=resume_s)
    )
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    up = client.connect("127.0.0.1", port, name_of_peer=name, timeout_s=PATIENCE_S)
    return links.get(timeout=PATIENCE_S), up


@pytest.mark.parametrize(
    ("listener", "dialler"), [(a, b) for a, b in itertools.product(LISTENERS, HOSTS) if a != b]
)
def test_each_host_may_meet_each_listener_under_its_own_name(
    workshop, certificates, listener, dialler
):
    files, _ = certificates
    down, up = meet(workshop, (listener, files, listener), (dialler, files, dialler))
    assert (down.peer, up.peer) == (dialler, listener)


@pytest.mark.parametrize(
    ("shown", "claimed"), [(a, b) for a, b in itertools.product(HOSTS, HOSTS) if a != b]
)
def test_no_certificate_joins_under_another_name(workshop, certificates, shown, claimed):
    files, _ = certificates
    with pytest.raises(AuthenticationError, match=f"name is {claimed}, .* names {shown}"):
        meet(workshop, ("server", files, "server"), (claimed, files, shown))
    assert not workshop.endpoints[0].links


@pytest.mark.parametrize(
    ("shown", "claimed"), [(a, b) for a, b in itertools.product(LISTENERS, LISTENERS) if a != b]
)
def test_no_listener_answers_under_another_name(workshop, certificates, shown, claimed):
    """Even at the right address, as of several hosts of one machine."""
    files, _ = certificates
    with pytest.raises(AuthenticationError, match=f"name is {claimed}, .* names {shown}"):
        meet(workshop, (claimed, files, shown), ("d0", files, "d0"))


def test_who_shows_no_certificate_trusts_the_address_alone(workshop, certificates):
    """A server's certificate may be one of a public authority, which knows no hosts of runs."""
    files, _ = certificates
    server = workshop.endpoint("coordinator", tls(files, "server"))
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    client = workshop.endpoint("d0", tls(files))
    assert (
        client.connect("127.0.0.1", port, name_of_peer="s", timeout_s=PATIENCE_S).peer
        == "coordinator"
    )


def test_the_name_that_is_expected_is_the_one_that_is_met(workshop):
    server, client = workshop.endpoint("n2"), workshop.endpoint("d0")
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    with pytest.raises(HandshakeError, match="name is n2, expected n1"):
        client.connect("127.0.0.1", port, name_of_peer="n1", timeout_s=PATIENCE_S, expected="n1")
    assert client.connect(
        "127.0.0.1", port, name_of_peer="n2", timeout_s=PATIENCE_S, expected="n2"
    ).peer


def test_names_are_bound_on_every_connection_of_a_stream(workshop, certificates):
    """Who knows the session of another device's stream cannot take it over."""
    files, _ = certificates
    down, up = meet(workshop, ("server", files, "server"), ("d0", files, "d0"), resume_s=30)
    thief = workshop.endpoint("d1", ChannelOptions(tls=tls(files, "d1").tls, resume_s=30))
    thief.name = "d0"
    from comms.link.dial import Dial

    port = int(up.address.rpartition(" ")[2])
    future: queue.Queue = queue.Queue()

    class Future:
        done = staticmethod(lambda: False)
        set_exception = staticmethod(future.put)
        set_result = staticmethod(future.put)

    dial = Dial(
        thief,
        [(socket.AF_INET, ("127.0.0.1", port))],
        "127.0.0.1",
        f"server at port {port}",
        future=Future(),
    )
    dial.session, dial.attempt = up.stream.session, 100
    import time

    thief.loop.post(lambda: dial.begin(time.monotonic() + PATIENCE_S))
    assert "its certificate names d1" in str(future.get(timeout=PATIENCE_S))
    assert down.error is None
