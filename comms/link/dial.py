"""Connection attempts to a listener: at the start, and whenever a stream is interrupted."""

from __future__ import annotations

import concurrent.futures
import random
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from comms.emulation.shaping import LinkShape
from comms.errors import ChannelError, ConnectError, HandshakeError, explain
from comms.link.pending_connection import (
    CutShortError,
    NoListenerError,
    PendingConnection,
    TooLateError,
)
from comms.wire.event_loop import Guard, place_of
from comms.wire.greeting import Terms
from comms.wire.handshake import ClientHandshake

if TYPE_CHECKING:
    from comms.link.endpoint import Endpoint
    from comms.link.link import Link
    from comms.link.stream import Stream

Address: TypeAlias = tuple[int, Any]
_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 1.0
_MAX_CUT_SHORT = 5


class Dial:
    """Attempts to connect to any address, with back-off and jitter, until a deadline.

    Attributes:
      where: The listener, for messages.
      session: Names the stream on both sides.
      attempt: Number of the stream's connections so far.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        addresses: list[Address],
        host: str,
        where: str,
        *,
        future: concurrent.futures.Future[Link] | None = None,
        shape: LinkShape | None = None,
        stream: Stream | None = None,
        expected: str | None = None,
        retry: bool = True,
    ) -> None:
        self._retry = retry
        self.where = where
        self._endpoint = endpoint
        self._loop = Guard(endpoint.loop, self._failed_here)
        self._expected = expected if stream is None else stream.peer
        self._addresses = addresses
        self._host = host
        self._future = future
        self._shape = shape
        self._stream = stream
        self.session = secrets.token_hex(16) if stream is None else stream.session
        self._until_s = 0.0
        self._tries = 0
        self._cut_short = 0
        self.attempt = 0
        self._opening: PendingConnection | None = None
        self._last_error = "no answer"

    def begin(self, until_s: float) -> None:
        """Starts the first attempt."""
        self._until_s = until_s
        self._endpoint.add_dial(self)
        self._loop.run(self._try)

    def _over(self) -> bool:
        if self._stream is not None:
            return self._stream.queue.error is not None
        return self._future is None or self._future.done()

    def _try(self) -> None:
        if self._over():
            self._endpoint.end_dial(self)
            return
        endpoint, stream = self._endpoint, self._stream
        if stream is not None:
            stream.attempt += 1
            self.attempt = stream.attempt
        else:
            self.attempt += 1
            if endpoint.options.resume_s == 0:
                # An interrupted attempt may have left a stream with this name at the listener,
                # which ends with its connection and cannot be resumed.
                self.session = secrets.token_hex(16)
        family, address = self._addresses[self._tries % len(self._addresses)]
        self._tries += 1
        options = endpoint.options
        received, partial_bytes = (0, 0) if stream is None else stream.received()
        terms = Terms(
            name=endpoint.name,
            session=self.session,
            attempt=self.attempt,
            received=received,
            partial_bytes=partial_bytes,
            resumed=stream is not None,
            window_bytes=options.window_bytes,
            resume_s=options.resume_s,
            checksum=options.wants_checksum,
        )
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # out of descriptors
            self._failed(None, ConnectError(f"no socket: {explain(error)}"))
            return
        tls = endpoint.client_tls
        name = None
        if tls is not None and options.tls is not None:
            name = options.tls.server_name or self._host
        rest_s = max(0.05, self._until_s - time.monotonic())
        self._opening = PendingConnection(
            endpoint.loop,
            sock,
            ClientHandshake(terms, options.token, self._expected),
            tls=tls,
            server_name=name,
            bind_names=options.tls is not None and options.tls.certificate is not None,
            deadline_s=min(options.silence_s, rest_s),
            on_done=self._done,
            on_failed=self._failed,
        )
        self._opening.begin(address)

    def _done(self, opening: PendingConnection) -> None:
        self._endpoint.end_dial(self)
        terms = opening.handshake.terms
        assert terms is not None
        if self._over():
            opening.transport.close()
            return
        stream = self._stream
        connection = opening.transport, opening.handshake.leftover, terms
        if stream is not None:
            if not terms.resumed:
                opening.transport.close()
                stream.refuse_resume(HandshakeError("the peer started a new stream"))
                return
            stream.guard.run(stream.attach, *connection)
            return
        address = self.where.rpartition(" at ")[2]
        link = self._endpoint.make_link(terms, address, dialled=True, session=self.session)
        link.stream.attempt = self.attempt
        if self._shape is not None:
            link.stream.reshape(self._shape)
        self._endpoint.adopt(link, self._addresses, self._host)
        link.stream.guard.run(link.stream.attach, *connection)
        if self._future is not None:
            self._future.set_result(link)

    def _failed(self, opening: PendingConnection | None, error: ChannelError) -> None:
        now = time.monotonic()
        left_s = self._until_s - now
        if self._tries == 1 or left_s > 0 or not isinstance(error, TooLateError):
            # The time of the last attempt may be too short for any answer, which is no reason.
            self._last_error = str(error)
        self._cut_short += isinstance(error, CutShortError)
        # Interruptions during resumption are expected; a first handshake that is always interrupted
        # means that the two sides are configured differently.
        final = isinstance(error, HandshakeError) or (
            self._stream is None and self._cut_short == _MAX_CUT_SHORT
        )
        gone = isinstance(error, NoListenerError) and not self._retry
        pause_s = min(_FIRST_PAUSE_S * 1.6 ** min(self._tries, 20), _MAX_PAUSE_S)
        pause_s *= random.uniform(0.5, 1.0)  # a thousand devices must not return at once
        if final:
            self.fail(error)
        elif left_s <= 0 or gone:
            waited = "in time" if self._stream is not None else f"after {self._tries} tries"
            self.fail(
                ConnectError(
                    f"cannot reach {self.where} {waited}: {self._last_error}; check that it runs, "
                    "and check address, port and firewall"
                )
            )
        else:
            # The last attempt is at the deadline; giving up at the last pause would be too early.
            self._loop.at(now + min(pause_s, left_s), self._try)

    def _failed_here(self, error: Exception) -> None:
        """Ends the attempts because of an unexpected exception; see ``Guard``."""
        failure = HandshakeError(
            f"this side failed while connecting to {self.where}: {place_of(error)}"
        )
        failure.__cause__ = error
        self.fail(failure)

    def fail(self, error: ChannelError) -> None:
        """Ends the attempts."""
        self._endpoint.end_dial(self)
        if self._opening is not None:
            self._opening.abort()
        if self._stream is not None:
            self._stream.refuse_resume(error)
        elif self._future is not None and not self._future.done():
            self._future.set_exception(error)
