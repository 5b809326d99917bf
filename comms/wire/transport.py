"""A non-blocking connection, plain or TLS, that moves views of memory and says when it would wait.

TCP options: NODELAY, since frames are whole when they are written and nobody should wait to fill a
segment; NOTSENT_LOWAT where the system has it, so that little lies unsent in the kernel where a
heartbeat cannot overtake it. Buffer sizes are left to the system's tuning, which finds the
bandwidth-delay product that a fixed size would guess; only where the measured rate is low does
SO_SNDBUF bound what is in flight, since TCP would fill the queues before the slow link until they
overflow. RCVLOWAT on Linux while the rest of a large frame is awaited on a fast link: to wake the
receiver for every few segments costs the sender a quarter of its time.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Any, Final

from comms.errors import explain

_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", None)
_LINUX: Final = sys.platform.startswith("linux")
_TLS_WRITE_BYTES = 1 << 17
_TLS_RECORD_BYTES = 1 << 14
_LIFTED_BYTES = 4 << 20
MAX_BUFFERS = 64


class ConnectionEnded(Exception):
    """The connection is at its end; the argument says how."""


class CertificateRefused(ConnectionEnded):
    """One side's certificate was not accepted; trying again would not help."""


class Transport:
    """A connected socket. ``send`` and ``receive`` return None where they would have to wait."""

    secure = False

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lowat = 0
        self._in_flight = 0
        self._wake = 1
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
            value = nbytes * 5 // 8 if _LINUX else nbytes
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, value)

    def wake_at(self, nbytes: int) -> None:
        """Makes the selector report the socket only when so many bytes (or the end) are there.

        Whoever asks for more than 1 must know that so many are on their way. Does nothing but on
        Linux, which also looks at what has arrived already when the bound is lowered.
        """
        if _LINUX and nbytes != self._wake:
            self._wake = nbytes
            with contextlib.suppress(OSError):  # already closed
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes from the front of the buffers; returns the bytes taken, None if it would wait.

        Less than was offered is taken only if the kernel would not have more.

        Raises:
          ConnectionEnded: If the connection is broken.
        """
        try:
            return self.socket.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise ConnectionEnded(f"sending failed: {explain(error)}") from error

    def receive(self, first: memoryview, then: memoryview | None = None) -> int | None:
        """Reads into ``first``, then into ``then``; returns the bytes read, None if it would wait.

        Less than there is room for means that no more was there.

        Raises:
          ConnectionEnded: At the end of the stream or if the connection is broken.
        """
        try:
            if then is None:
                count = self.socket.recv_into(first)
            else:
                count = self.socket.recvmsg_into((first, then))[0]
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise ConnectionEnded(f"receiving failed: {explain(error)}") from error
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


class _TlsSocket(ssl.SSLSocket):
    """An SSLSocket that is closed if its peer has gone before TLS begins.

    ``wrap_socket`` looks for early data then, and leaves the socket open when that raises.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receives as a plain SSLSocket does; a connection that is gone is closed as well."""
        try:
            return super().recv(buflen, flags)
        except ConnectionError:
            self.close()
            raise


def for_transports(context: ssl.SSLContext) -> ssl.SSLContext:
    """Prepares a context for ``TlsTransport``, once for all its connections, and returns it."""
    context.sslsocket_class = _TlsSocket
    return context


class TlsTransport(Transport):
    """A connected socket under TLS 1.3; ``handshake`` has to succeed before anything else.

    Args:
      sock: A connected socket; owned from here on.
      context: One that ``for_transports`` has prepared.
      server_name: The name to verify in the listener's certificate; None on the listening side.
    """

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
          ConnectionEnded: If the two sides do not agree.
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
            raise ConnectionEnded(f"the TLS handshake failed: {explain(error)}") from error
        return None

    def peer_names(self) -> tuple[str, ...] | None:
        """Returns the host names in the peer's certificate, or None if it has shown none."""
        shown = self._tls.getpeercert()
        if not shown:
            return None
        names: Any = shown.get("subjectAltName", ())  # pairs of a kind and a name
        return tuple(str(name) for kind, name in names if kind == "DNS")

    def wake_at(self, nbytes: int) -> None:
        """As for a plain socket, but for what of a record the library may have read already."""
        super().wake_at(max(1, nbytes - 2 * _TLS_RECORD_BYTES))

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes from the front; a retry after less than all must begin with the same bytes."""
        sent = index = offset = 0
        while index < len(buffers):
            piece: memoryview | bytes = buffers[index][offset : offset + _TLS_WRITE_BYTES]
            if len(piece) < _TLS_RECORD_BYTES and index + 1 < len(buffers):
                piece = _one_record(buffers, index, offset)
            try:
                count = self._tls.send(piece)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return sent or None
            except (ssl.SSLError, OSError) as error:
                raise ConnectionEnded(f"sending failed: {explain(error)}") from error
            sent += count
            offset += count
            while index < len(buffers) and offset >= len(buffers[index]):
                offset -= len(buffers[index])
                index += 1
        return sent

    def receive(self, first: memoryview, then: memoryview | None = None) -> int | None:
        """Reads record after record, since the selector does not see what is decrypted already."""
        got = 0
        for view in (first,) if then is None else (first, then):
            while view:
                try:
                    count = self._tls.recv_into(view)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return got or None
                except (ssl.SSLError, OSError) as error:
                    if got:
                        return got  # a broken connection says so again
                    raise ConnectionEnded(f"receiving failed: {explain(error)}") from error
                if count == 0:
                    if got:
                        return got
                    raise ConnectionEnded("the peer ended the connection")
                got += count
                view = view[count:]
        return got


def _one_record(buffers: Sequence[memoryview], index: int, offset: int) -> bytes:
    """Joins what fills a record: one for each header would cost a system call and a MAC."""
    parts: list[memoryview] = []
    room = _TLS_RECORD_BYTES
    for buffer in itertools.islice(buffers, index, None):
        parts.append(buffer[offset : offset + room])
        offset = 0
        room -= len(parts[-1])
        if room == 0:
            break
    return b"".join(parts)
