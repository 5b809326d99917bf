"""The listening side of an endpoint: new connections, their handshakes, streams that resume."""

from __future__ import annotations

import functools
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeAlias

from comms.errors import ChannelError, HandshakeError
from comms.link.doorstep import Doorstep
from comms.link.link import Link
from comms.link.pending_connection import PendingConnection
from comms.options import ChannelOptions
from comms.wire.event_loop import READ, Loop, report
from comms.wire.greeting import Terms
from comms.wire.handshake import ServerHandshake

#: Connections accepted in one turn of the loop.
_TURN = 64
#: Seconds for which a listener rests after an error of accepting.
_REST_S = 0.5

OnLink: TypeAlias = Callable[[Link], None]


class Reception:
    """Accepts connections for an endpoint; only the I/O thread calls its methods.

    Args:
      name: Name of the endpoint.
      options: Its settings.
      loop: The I/O thread.
      links: The endpoint's links by session; new ones are added.
      make_link: Makes a link to a peer from its terms and its address.
      is_closing: Returns whether the endpoint is being closed.

    Attributes:
      doorstep: The unfinished connections.
      listeners: The listening sockets.
      openings: The connections whose handshake is not finished.
    """

    def __init__(
        self,
        name: str,
        options: ChannelOptions,
        loop: Loop,
        links: dict[str, Link],
        make_link: Callable[[Terms, str], Link],
        is_closing: Callable[[], bool],
    ) -> None:
        self._name, self._options, self._loop = name, options, loop
        self._links, self._make_link, self._is_closing = links, make_link, is_closing
        self.doorstep = Doorstep(options.limits)
        self.listeners: list[socket.socket] = []
        self.openings: set[PendingConnection] = set()

    def open(
        self, listener: socket.socket, tls: ssl.SSLContext | None, on_link: OnLink, expected: int
    ) -> None:
        """Adds a listening socket.

        Args:
          listener: The socket; owned from here on.
          tls: Context if its connections are encrypted.
          on_link: Called with each new link.
          expected: Number of peers that may connect at about the same time.
        """
        self.listeners.append(listener)
        self.doorstep.expected = max(self.doorstep.expected, expected)
        self.invite(listener, tls, on_link)

    def invite(self, listener: socket.socket, tls: ssl.SSLContext | None, on_link: OnLink) -> None:
        """Accepts connections of a listener as they come."""
        self._loop.watch(listener, READ, lambda _: self.accept(listener, tls, on_link))

    def accept(self, listener: socket.socket, tls: ssl.SSLContext | None, on_link: OnLink) -> None:
        """Accepts the connections that wait at a listener."""
        for _ in range(_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # Out of descriptors, or an error of the new connection: open connections continue,
                # new ones wait in the backlog.
                self._loop.forget(listener)
                again = functools.partial(self.invite, listener, tls, on_link)
                self._loop.at(time.monotonic() + _REST_S, again)
                return
            where = f"{address[0]} port {address[1]}"
            options = self._options
            opening = PendingConnection(
                self._loop,
                sock,
                ServerHandshake(self._name, options.token, self.admit),
                tls=tls,
                server_name=None,
                bind_names=options.tls is not None and options.tls.require_peer,
                deadline_s=options.silence_s,
                on_done=functools.partial(
                    self._accepted, host=address[0], where=where, on_link=on_link
                ),
                on_failed=self._turned_away,
            )
            self.openings.add(opening)
            opening.begin()
            if opening in self.openings:
                self.doorstep.enter(opening, address[0])

    def admit(self, hello: Terms) -> Terms:
        """Checks whether an authenticated peer may open or resume its stream; returns our terms.

        Raises:
          HandshakeError: It may not.
        """
        link = self._links.get(hello.session)
        stream = None if link is None else link.stream
        if self._is_closing():
            raise HandshakeError("closing down")
        if stream is None:
            if hello.resumed:
                raise HandshakeError("that stream is unknown here (was this side restarted?)")
        else:
            if stream.peer != hello.name or stream.dialled:
                raise HandshakeError("that stream belongs to another peer")
            if hello.attempt <= stream.attempt:
                raise HandshakeError("a later connection has resumed that stream already")
            if stream.resume_s == 0:
                raise HandshakeError("that stream ends with its connection (resume_s is 0)")
            # From here on no data of the old connection can be delivered.
            stream.attempt = hello.attempt
            stream.suspend()
            if stream.queue.error is not None:
                raise HandshakeError("that stream has just ended here")
        received, partial_bytes = (0, 0) if stream is None else stream.received()
        return Terms(
            name=self._name,
            session=hello.session,
            attempt=hello.attempt,
            received=received,
            partial_bytes=partial_bytes,
            resumed=stream is not None,
            window_bytes=self._options.window_bytes,
            resume_s=self._options.resume_s,
            checksum=self._options.wants_checksum,
        )

    def stop(self) -> None:
        """Closes the listeners and ends all handshakes."""
        for listener in self.listeners:
            self._loop.forget(listener)
            listener.close()
        self.listeners.clear()
        for opening in list(self.openings):
            opening.abort()
        self.openings.clear()

    def _turned_away(self, opening: PendingConnection, error: ChannelError) -> None:
        self.openings.discard(opening)
        self.doorstep.leave(opening)
        if error.__cause__ is not None and not isinstance(error.__cause__, OSError | ChannelError):
            report(error)  # a bug on this side, without a caller

    def _accepted(
        self, opening: PendingConnection, *, host: str, where: str, on_link: OnLink
    ) -> None:
        self.openings.discard(opening)
        self.doorstep.leave(opening)
        terms = opening.handshake.terms
        assert terms is not None
        link = self._links.get(terms.session)
        fresh = link is None
        if link is None:
            link = self._make_link(terms, where)
            self._links[terms.session] = link
            self.doorstep.enter(link.stream, host)
        stream = link.stream
        stream.guard.run(stream.attach, opening.transport, opening.handshake.leftover, terms)
        if fresh:
            stream.guard.run(on_link, link)
