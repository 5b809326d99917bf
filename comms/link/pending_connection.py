"""A connection from its socket to the finished handshake, without blocking."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from comms.errors import (
    AuthenticationError,
    BusyError,
    ChannelError,
    ConnectError,
    HandshakeError,
)
from comms.wire.event_loop import READ, WRITE, Guard, Loop, Timer, place_of, report
from comms.wire.handshake import ClientHandshake, Handshake, refusal
from comms.wire.transport import CertificateRefused, ConnectionEnded, TlsTransport, Transport


class NoListenerError(ConnectError):
    """No process listens at an address of a machine that answers."""


class TooLateError(ConnectError):
    """The listener did not complete the handshake in time."""


class CutShortError(ConnectError):
    """The peer was reached but the connection ended before the handshake did."""


def _cut_short(error: ConnectionEnded) -> CutShortError:
    return CutShortError(
        f"the handshake was interrupted: {error} (does only one side use TLS, or require a "
        "certificate, or does the listener have too many unfinished connections?)"
    )


class PendingConnection:
    """Connects, or takes over an accepted socket, then performs both handshakes.

    Args:
      loop: The I/O thread, on which everything here runs.
      sock: A new or an accepted socket; owned from here on.
      handshake: This side of the channel's handshake.
      tls: Context if the connection is to be encrypted.
      server_name: The name to verify in the listener's certificate; None on the listening side.
      bind_names: Whether the peer's name has to be in its certificate.
      deadline_s: Time limit of the whole handshake, also for slow peers.
      on_done: Called after success.
      on_failed: Called with a ConnectError if another attempt may succeed, a HandshakeError if not.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        handshake: Handshake,
        *,
        tls: ssl.SSLContext | None,
        server_name: str | None,
        bind_names: bool,
        deadline_s: float,
        on_done: Callable[[PendingConnection], None],
        on_failed: Callable[[PendingConnection, ChannelError], None],
    ) -> None:
        self.handshake = handshake
        self._loop = Guard(loop, self._failed_here)
        self._sock = sock
        self._tls = tls
        self._server_name = server_name
        self._bind_names = bind_names
        self._deadline_s = deadline_s
        self._on_done = on_done
        self._on_failed = on_failed
        self._transport: Transport | None = None
        self._timer: Timer | None = None
        self._to_write = b""
        self._buffer = memoryview(bytearray(4096))
        self._ended = False
        self._shaken = False
        sock.setblocking(False)

    @property
    def transport(self) -> Transport:
        """The connection, once the socket is connected."""
        assert self._transport is not None
        return self._transport

    def begin(self, address: Any = None) -> None:
        """Starts: connects first if an address is given."""
        self._loop.run(self._begin, address)

    def _begin(self, address: Any) -> None:
        self._timer = self._loop.at(time.monotonic() + self._deadline_s, self._too_late)
        if address is None:
            self._connected()
            return
        code = self._sock.connect_ex(address)
        if code == 0:
            self._connected()
        elif code in (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR):
            self._loop.watch(self._sock, WRITE, lambda _: self._connect_ended())
        else:
            self._fail(_not_connected(code))

    def _connect_ended(self) -> None:
        if self._ended:
            return
        try:
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            # Connecting to a local port without a listener may connect the socket to itself.
            if not code and self._sock.getsockname() == self._sock.getpeername():
                code = errno.ECONNREFUSED
        except OSError as error:  # reset in the meantime
            code = error.errno or errno.ECONNRESET
        if code:
            self._fail(_not_connected(code))
        else:
            self._connected()

    def _connected(self) -> None:
        try:
            if self._tls is None:
                self._transport = Transport(self._sock)
            else:
                self._loop.forget(self._sock)
                self._transport = TlsTransport(self._sock, self._tls, self._server_name)
                self._sock = self._transport.socket
        except (OSError, ValueError) as error:
            self._fail(ConnectError(f"the connection ended immediately: {error}"))
            return
        if isinstance(self.handshake, ClientHandshake):
            self._to_write = self.handshake.opening
        if isinstance(self._transport, TlsTransport):
            self._shake_hands(self._transport)
        else:
            self._exchange(0)

    def _shake_hands(self, transport: TlsTransport) -> None:
        if self._ended:
            return
        try:
            wanted = transport.handshake()
        except CertificateRefused as error:
            self._fail(AuthenticationError(str(error)))
            return
        except ConnectionEnded as error:
            self._fail(_cut_short(error))
            return
        if wanted is None:
            self._shaken = True
            if self._bind_names:
                self.handshake.names = transport.peer_names()
            self._exchange(READ)
        else:
            events = READ if wanted == "read" else WRITE
            self._loop.watch(self._sock, events, lambda _: self._shake_hands(transport))

    def _exchange(self, events: int) -> None:
        """Writes and reads handshake messages until it would block."""
        try:
            while not self._ended:
                if self._to_write:
                    taken = self.transport.send([memoryview(self._to_write)])
                    if taken is None:
                        self._loop.watch(self._sock, READ | WRITE, self._exchange)
                        return
                    self._to_write = self._to_write[taken:]
                    continue
                if self.handshake.done:
                    self._finish()
                    return
                count = self.transport.receive(self._buffer)
                if count is None:
                    self._loop.watch(self._sock, READ, self._exchange)
                    return
                self._to_write += self.handshake.feed(bytes(self._buffer[:count]))
        except (HandshakeError, BusyError) as error:
            self._refuse(error)
        except ConnectionEnded as error:
            self._fail(_cut_short(error))

    def _refuse(self, error: ChannelError) -> None:
        # If the peer has already ended, the current error is the relevant one.
        with contextlib.suppress(ConnectionEnded):
            self.transport.send([memoryview(refusal(error, self.handshake.name))])
            self.transport.shut()
            for _ in range(4):  # unread data would make close discard the reason
                if not self.transport.receive(self._buffer):
                    break
        self._fail(error)

    def turn_away(self, error: BusyError) -> None:
        """Ends an accepted connection beyond the limit, and sends the reason if possible."""
        self._loop.run(self._turn_away, error)

    def _turn_away(self, error: BusyError) -> None:
        secure = isinstance(self._transport, TlsTransport)
        if self._transport is not None and not (secure and not self._shaken):
            self._refuse(error)
        else:
            self._fail(error)

    def _failed_here(self, error: Exception) -> None:
        """Ends only this connection because of an unexpected exception; see ``Guard``."""
        failure = HandshakeError(f"this side failed during the handshake: {place_of(error)}")
        failure.__cause__ = error
        if self._ended:
            report(error)
        else:
            self._fail(failure)

    def _finish(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.forget(self._sock)
        self._on_done(self)

    def _too_late(self) -> None:
        self._fail(TooLateError(f"no complete handshake within {self._deadline_s:.1f} s"))

    def _fail(self, error: ChannelError) -> None:
        if not self._ended:
            self.abort()
            self._on_failed(self, error)

    def abort(self) -> None:
        """Closes the socket without a callback."""
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.forget(self._sock)
        self._sock.close()


def _not_connected(code: int) -> ConnectError:
    """Returns the error for a number of the system's with which connecting failed."""
    kind = NoListenerError if code == errno.ECONNREFUSED else ConnectError
    return kind(os.strerror(code))
