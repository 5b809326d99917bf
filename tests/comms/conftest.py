"""Pairs of endpoints over loopback, and a collector of what arrives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from comms import ChannelError, ChannelOptions, Endpoint, Link, LinkShape, Message, TlsOptions
from pipar_jax.launch.certificates import Certificates, add_certificate, make_authority
from tests.patience import PATIENCE_S


class Collector:
    """Keeps what a link delivers; releases messages at once unless told to hold them."""

    def __init__(self, link: Link, hold: bool = False) -> None:
        self.link = link
        self.messages: queue.Queue[Message] = queue.Queue()
        self.lost: queue.Queue[ChannelError] = queue.Queue()
        self.credit = threading.Event()
        self.hold = hold
        link.start(self.messages.put, self.credit.set, self.lost.put)

    def take(self, timeout_s: float = PATIENCE_S) -> Message:
        return self.messages.get(timeout=timeout_s)

    def take_array(self, timeout_s: float = PATIENCE_S) -> np.ndarray:
        message = self.take(timeout_s)
        array = message.array
        if not self.hold:
            message.release()
        return array

    def take_lost(self, timeout_s: float = PATIENCE_S) -> ChannelError:
        return self.lost.get(timeout=timeout_s)


def admitting(on_link: Callable[[Link], object]) -> Callable[[Link], None]:
    """Returns what to listen with where every peer is welcome to all that the limits allow."""

    def admit(link: Link) -> None:
        link.admit()
        on_link(link)

    return admit


@dataclass
class Pair:
    """A listening endpoint, a connected one and their two ends of one link."""

    server: Endpoint
    client: Endpoint
    down: Link
    up: Link
    port: int
    at_server: Collector
    at_client: Collector


@dataclass
class Workshop:
    """Makes endpoints and pairs and closes them all at the end of the test."""

    endpoints: list[Endpoint] = field(default_factory=list)

    def endpoint(self, name: str, options: ChannelOptions | None = None) -> Endpoint:
        endpoint = Endpoint(name, options=options)
        self.endpoints.append(endpoint)
        return endpoint

    def pair(
        self,
        options: ChannelOptions | None = None,
        *,
        client_options: ChannelOptions | None = None,
        shape: LinkShape | None = None,
        hold: bool = False,
        through: Callable[[int], int] | None = None,
    ) -> Pair:
        """Connects a client to a server; `through` maps the server's port to a proxy's."""
        server = self.endpoint("server", options)
        client = self.endpoint("d0", client_options or options)
        links: queue.Queue[Link] = queue.Queue()
        _, port = server.listen("127.0.0.1", 0, admitting(links.put))
        reached = port if through is None else through(port)
        up = client.connect(
            "127.0.0.1", reached, name_of_peer="server", timeout_s=PATIENCE_S, shape=shape
        )
        down = links.get(timeout=PATIENCE_S)
        return Pair(server, client, down, up, port, Collector(down, hold), Collector(up, hold))


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    yield made
    for endpoint in reversed(made.endpoints):
        endpoint.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> tuple[Certificates, Certificates]:
    """An authority with certificates for the hosts of a run, and one that nobody knows."""
    files = make_authority(tmp_path_factory.mktemp("tls") / "trial")
    for name in ("server", "n1", "n2"):
        add_certificate(files, name, ["127.0.0.1"])
    for name in ("d0", "d1"):
        add_certificate(files, name, [])
    add_certificate(files, "elsewhere", ["192.0.2.1"])
    add_certificate(files, "expired", ["127.0.0.1"], days=0)
    stranger = make_authority(tmp_path_factory.mktemp("tls") / "stranger")
    add_certificate(stranger, "d0", [])
    return files, stranger


def tls(files: Certificates, name: str | None = None, **fields: object) -> ChannelOptions:
    """Returns options with TLS, as a host of the run or, without a name, with no certificate."""
    pair = {} if name is None else {"certificate": files.certificate(name), "key": files.key(name)}
    return ChannelOptions(tls=TlsOptions(authority=files.authority, **pair, **fields))
