"""An endpoint: the one I/O thread of a process, its listeners and all its links."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from comms.emulation.shaping import LinkShape
from comms.errors import ChannelError, ConnectError, PeerLost, explain
from comms.link.dial import Address, Dial
from comms.link.link import Link
from comms.link.reception import OnLink, Reception
from comms.link.stream import Stream
from comms.options import ChannelOptions
from comms.wire.buffers import BufferPool
from comms.wire.event_loop import Loop
from comms.wire.greeting import MAX_NAME, Terms, is_name
from comms.wire.transport import for_transports

_BACKLOG = 1024
_CLOSE_GRACE_S = 0.25


class Endpoint:
    """The endpoint of all links of a process; a context manager.

    Args:
      name: Name of this side in handshakes.
      options: Settings for all links.

    Raises:
      ChannelError: If the name is empty or too long, or the TLS files cannot be read.
    """

    def __init__(self, name: str, *, options: ChannelOptions | None = None) -> None:
        if not is_name(name):
            raise ChannelError(f"an endpoint's name is a text of 1 to {MAX_NAME} characters")
        self.name = name
        self.options = ChannelOptions() if options is None else options
        self.pool = BufferPool(self.options.pool_bytes)
        self.loop = Loop("pipar-io", self._thread_failed)
        self._client_tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._links: dict[str, Link] = {}  # by session
        self._addresses: dict[str, tuple[list[Address], str]] = {}
        self._closing = False
        self.reception = Reception(
            name,
            self.options,
            self.loop,
            self._links,
            lambda terms, where: self.make_link(terms, where, dialled=False, session=terms.session),
            lambda: self._closing,
        )
        self._dials: set[Dial] = set()
        if self.options.tls is not None:
            self._client_tls = for_transports(self.options.tls.client_context())
        self.loop.start()

    def __enter__(self) -> Self:
        """Returns the endpoint."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the endpoint."""
        self.close()

    def post(self, call: Callable[[], None]) -> None:
        """Runs a call on the I/O thread, after earlier ones; it must not block."""
        self.loop.post(call)

    @property
    def links(self) -> list[Link]:
        """The links that have not ended."""
        return list(self._links.values())

    @property
    def handshakes(self) -> int:
        """Number of connections to this side's listeners whose handshake is not finished."""
        return len(self.reception.openings)

    # -- any thread ----------------------------------------------------------------------------

    def listen(
        self, host: str, port: int, on_link: OnLink, *, expected_peers: int = 0
    ) -> tuple[str, int]:
        """Accepts peers.

        Args:
          host: Address to listen on.
          port: Port to listen on; 0 lets the system choose.
          on_link: Called with each new link, on the I/O thread; messages wait until ``Link.start``,
            and only a join is accepted until ``Link.admit``.
          expected_peers: Number of peers that may connect at about the same time, possibly all from
            one address; raises the limit of unfinished connections, see ``Limits``.

        Returns:
          The address and port it listens on.

        Raises:
          ChannelError: If the address cannot be used, or is beyond the loopback interface and
            no token is configured.
        """
        self._check_open()
        files = self.options.tls
        tls = None if files is None else for_transports(files.server_context())
        family, address = _resolve(host, port, passive=True)[0]
        loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if not loopback and self.options.token is None and not self.options.listen_openly:
            raise ChannelError(
                f"refusing to listen on {host}, which other machines may reach, without a token: "
                "set ChannelOptions.token on both sides, listen on 127.0.0.1, or set "
                "listen_openly=True if everybody who can reach that address may connect"
            )
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ConnectError(
                f"{self.name} cannot listen on {host} port {port}: {explain(error)}; "
                "choose another port, or 0 for any free one"
            ) from error
        where = sock.getsockname()

        self.loop.post(lambda: self.reception.open(sock, tls, on_link, expected_peers))
        return where[0], where[1]

    def connect(
        self,
        host: str,
        port: int,
        *,
        name_of_peer: str,
        timeout_s: float,
        shape: LinkShape | None = None,
        expected: str | None = None,
        retry: bool = True,
    ) -> Link:
        """Connects to a listener, which may start later: refused connections are retried.

        Args:
          host: The listener's address or name.
          port: The listener's port.
          name_of_peer: Its name in error messages before the handshake.
          timeout_s: Time limit.
          shape: Emulated shape of this side's sending.
          expected: The required name of the listener; None accepts any.
          retry: Whether a refused connection is tried again; false for a listener that has been
            there, and so has ended.

        Raises:
          ConnectError: If the listener cannot be reached within ``timeout_s``.
          HandshakeError: If the handshake failed (version, token, certificate).
        """
        if self.loop.on_thread:
            raise ChannelError("connect() would block the I/O thread: call it from another thread")
        self._check_open()
        addresses = _resolve(host, port, passive=False)
        future: concurrent.futures.Future[Link] = concurrent.futures.Future()
        where = f"{name_of_peer} at {host} port {port}"
        dial = Dial(
            self, addresses, host, where, future=future, shape=shape, expected=expected, retry=retry
        )
        self.loop.post(lambda: dial.begin(time.monotonic() + timeout_s))
        try:
            return future.result(timeout_s + self.options.deadline_s)
        except concurrent.futures.TimeoutError as error:
            raise ConnectError(f"cannot reach {dial.where}: no answer") from error

    def close(self, timeout_s: float = 2.0) -> None:
        """Closes all links, waits for messages that are still being sent, and ends the thread.

        Args:
          timeout_s: Time limit of the wait.
        """
        if self.loop.on_thread:
            raise ChannelError("close() would block the I/O thread: call it from another thread")
        with self._lock:
            if self._closing:
                return
            self._closing = True
        until_s = time.monotonic() + timeout_s
        links = self.links
        self.loop.post(self._stop_opening)
        for link in links:
            link.close()
        for link in links:
            link.wait_closed(max(0.0, until_s - time.monotonic()))
        self.loop.post(self._abandon_all)
        self.loop.stop()
        self.loop.join(timeout_s + _CLOSE_GRACE_S)
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _check_open(self) -> None:
        if self.loop.failure is not None:
            raise ChannelError(f"the channel of {self.name} has failed: {self.loop.failure!r}")
        if self._closing:
            raise ChannelError(f"the endpoint {self.name} is closed")

    def encode(self, job: Callable[[], None]) -> None:
        """Runs a codec job on the codec worker; jobs run one after another, in order."""
        with self._lock:
            if self._worker is None:
                self._worker = concurrent.futures.ThreadPoolExecutor(1, "pipar-codec")
            self._worker.submit(job).add_done_callback(self._check_job)

    def _check_job(self, job: concurrent.futures.Future[None]) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            self.loop.post(lambda: self._thread_failed(error))

    # -- I/O thread: links ---------------------------------------------------------------------

    def make_link(self, terms: Terms, address: str, *, dialled: bool, session: str) -> Link:
        """Returns a new link to a peer whose handshake has finished."""
        stream = Stream(self, terms, address, dialled=dialled, session=session)
        return Link(stream, self.encode, self.reception.doorstep.leave)

    # -- I/O thread: connecting ----------------------------------------------------------------

    def add_dial(self, dial: Dial) -> None:
        """Registers a dial, so that closing ends it."""
        self._dials.add(dial)

    def end_dial(self, dial: Dial) -> None:
        """Unregisters a dial that has ended."""
        self._dials.discard(dial)

    def adopt(self, link: Link, addresses: list[Address], host: str) -> None:
        """Registers a new dialled link with the address for reconnects."""
        session = link.stream.session
        self._links[session] = link
        self._addresses[session] = (addresses, host)

    def redial(self, stream: Stream) -> None:
        """Attempts to resume an interrupted stream until its deadline."""
        addresses, host = self._addresses[stream.session]
        where = f"{stream.peer} at {stream.address}"
        dial = Dial(self, addresses, host, where, stream=stream)
        dial.begin(time.monotonic() + stream.resume_s)

    def forget(self, stream: Stream) -> None:
        """Drops the link of a stream that has ended."""
        self.reception.doorstep.leave(stream)
        link = self._links.get(stream.session)
        if link is not None and link.stream is stream:
            del self._links[stream.session]
            self._addresses.pop(stream.session, None)

    @property
    def client_tls(self) -> ssl.SSLContext | None:
        """The context for connections that this side opens."""
        return self._client_tls

    # -- I/O thread: the end -------------------------------------------------------------------

    def _stop_opening(self, why: str = "the endpoint was closed") -> None:
        self.reception.stop()
        for dial in list(self._dials):
            dial.fail(ConnectError(f"gave up on {dial.where}: {why}"))

    def _abandon_all(self) -> None:
        self._stop_opening()
        for link in self.links:
            link.stream.abandon(PeerLost(f"the link to {link.peer} was closed on this side"))

    def _thread_failed(self, error: BaseException) -> None:
        """Notifies all owners of links that the channel has failed."""
        self._stop_opening(f"the channel failed: {error!r}")
        for link in self.links:
            lost = PeerLost(f"lost {link.peer}: this side's channel failed: {error!r}")
            lost.__cause__ = error
            link.stream.abandon(lost)


def _resolve(host: str, port: int, *, passive: bool) -> list[Address]:
    """Looks up an address; blocks, so it runs on the caller's thread."""
    flags = socket.AI_PASSIVE if passive else 0
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectError(f"cannot look up {host!r}: {error}; check the name") from error
    return [(family, address) for family, _, _, _, address in addresses]
