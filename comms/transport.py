"""A non-blocking connection, plain or TLS, that moves views of memory and says when it would wait.

TCP options: NODELAY, since frames are whole when they are written and nobody should wait to fill a
segment; NOTSENT_LOWAT where the system has it, so that little lies unsent in the kernel where a
heartbeat cannot overtake it. Buffer sizes are left to the system's tuning, which finds the
bandwidth-delay product that a fixed size would guess; only where the measured rate is low does
SO_SNDBUF bound what is in flight, since TCP would fill the queues before the slow link until they
overflow.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Final

_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", None)
_TLS_WRITE_BYTES = 1 << 17
_TLS_RECORD_BYTES = 1 << 14
_LIFTED_BYTES = 4 << 20
MAX_BUFFERS = 64


class ConnectionEnded(Exception):
    """The connection is at its end; the argument says how."""


class CertificateRefused(ConnectionEnded):
    """One side's certificate was not accepted; trying again would not help."""


class Transport:
    """A connected socket. `send` and `receive` return None where they would have to wait."""

    secure = False

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lowat = 0
        self._in_flight = 0
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def limit_unsent(self, nbytes: int) -> None:
        """Bounds what lies unsent in the kernel, where the system can; ignores small changes."""
        if _NOTSENT_LOWAT is None or self._lowat // 2 < nbytes < self._lowat * 2:
            return
        self._lowat = nbytes
        with contextlib.suppress(OSError):  # a Unix socket, or already closed
            self.socket.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, nbytes)

    def limit_in_flight(self, nbytes: int | None) -> None:
        """Bounds what the kernel holds unsent and unacknowledged; None lifts an earlier bound.

        Never called on a link that was always fast: setting the size ends the system's own tuning.
        """
        if nbytes is None:
            if self._in_flight == 0:
                return
            nbytes = _LIFTED_BYTES
        if self._in_flight // 2 < nbytes < self._in_flight * 2:
            return
        self._in_flight = nbytes
        with contextlib.suppress(OSError):  # already closed
            # Linux doubles the value for its own records, which take about a fifth.
            value = nbytes * 5 // 8 if sys.platform.startswith("linux") else nbytes
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, value)

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes from the front of the buffers; returns the bytes taken, None if it would wait.

        Raises:
            ConnectionEnded: if the connection is broken.
        """
        try:
            return self.socket.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise ConnectionEnded(f"sending failed: {error.strerror or error}") from error

    def receive(self, first: memoryview, then: memoryview | None = None) -> int | None:
        """Reads into `first`, then into `then`; returns the bytes read, None if it would wait.

        Raises:
            ConnectionEnded: at the end of the stream or if the connection is broken.
        """
        try:
            if then is None:
                count = self.socket.recv_into(first)
            else:
                count = self.socket.recvmsg_into((first, then))[0]
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise ConnectionEnded(f"receiving failed: {error.strerror or error}") from error
        if count == 0:
            raise ConnectionEnded("the peer ended the connection")
        return count

    def shut(self) -> None:
        """Ends this side's sending; what was written still arrives."""
        with contextlib.suppress(OSError):  # broken already
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()


class TlsTransport(Transport):
    """A connected socket under TLS 1.3; `handshake` has to succeed before anything else."""

    secure = True

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None
    ) -> None:
        super().__init__(sock)
        self._tls = context.wrap_socket(
            sock,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
        )
        self.socket = self._tls

    def handshake(self) -> str | None:
        """Goes on with the handshake; returns None when done, else "read" or "write" to wait for.

        Raises:
            ConnectionEnded: if the two sides do not agree.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return "read"
        except ssl.SSLWantWriteError:
            return "write"
        except ssl.SSLCertVerificationError as error:
            raise CertificateRefused(
                f"the peer's certificate is refused: {error.verify_message}"
            ) from error
        except (ssl.SSLError, OSError) as error:
            raise ConnectionEnded(f"the TLS handshake failed: {_reason(error)}") from error
        return None

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes one piece from the front; a retry after None must begin with the same bytes."""
        piece: memoryview | bytes = buffers[0][:_TLS_WRITE_BYTES]
        if len(piece) < _TLS_RECORD_BYTES and len(buffers) > 1:
            # A record of its own for each header would cost a system call and a MAC: fill one up.
            parts: list[memoryview] = []
            room = _TLS_RECORD_BYTES
            for buffer in buffers:
                parts.append(buffer[:room])
                room -= len(parts[-1])
                if room == 0:
                    break
            piece = b"".join(parts)
        try:
            return self._tls.send(piece)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return None
        except (ssl.SSLError, OSError) as error:
            raise ConnectionEnded(f"sending failed: {_reason(error)}") from error

    def receive(self, first: memoryview, then: memoryview | None = None) -> int | None:
        """Reads decrypted bytes into `first` (`then` is filled by the next call)."""
        try:
            count = self._tls.recv_into(first)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (ssl.SSLError, OSError) as error:
            raise ConnectionEnded(f"receiving failed: {_reason(error)}") from error
        if count == 0:
            raise ConnectionEnded("the peer ended the connection")
        return count


def _reason(error: OSError) -> str:
    """Says what an SSL or system error means, without its source position."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).lower().replace("_", " ")
    return error.strerror or str(error)
