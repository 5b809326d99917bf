"""Non-blocking connections, plain or TLS, that transfer views of memory.

TCP options: NODELAY, since frames are written completely and should not wait for a full segment;
NOTSENT_LOWAT if available, so that little unsent data is in the kernel, where heartbeats cannot
overtake it. Buffer sizes are left to the system's tuning, which finds the bandwidth-delay product;
only if the measured rate is low, SO_SNDBUF limits the data in flight, since TCP would fill the
queues before the slow link until they overflow. RCVLOWAT on Linux for the rest of a large frame on
a fast link: waking the receiver for every few segments costs the sender a quarter of its time.
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
    """The connection has ended; the argument says how."""


class CertificateRefused(ConnectionEnded):
    """A certificate was not accepted; another attempt would not help."""


class Transport:
    """A connected socket; ``send`` and ``receive`` return None if they would block."""

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
        """Limits unsent data in the kernel, if the system supports it; ignores small changes."""
        if _NOTSENT_LOWAT is None or self._lowat // 2 < nbytes < self._lowat * 2:
            return
        self._lowat = nbytes
        with contextlib.suppress(OSError):  # a Unix socket, or already closed
            self.socket.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, nbytes)

    def limit_in_flight(self, nbytes: int | None) -> None:
        """Limits unsent and unacknowledged data in the kernel; None lifts an earlier limit.

        Not called on a link that was always fast, since setting the size disables the system's
        tuning.
        """
        if nbytes is None:
            if self._in_flight == 0:
                return
            nbytes = _LIFTED_BYTES
        if self._in_flight // 2 < nbytes < self._in_flight * 2:
            return
        self._in_flight = nbytes
        with contextlib.suppress(OSError):  # already closed
            # Linux doubles the value for its bookkeeping, which takes about a fifth.
            value = nbytes * 5 // 8 if _LINUX else nbytes
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, value)

    def wake_at(self, nbytes: int) -> None:
        """Makes the selector report the socket only when this many bytes (or the end) have arrived.

        A caller that sets more than 1 must know that these bytes will be sent. Has an effect only
        on Linux, which also checks data that have already arrived when the bound is lowered.
        """
        if _LINUX and nbytes != self._wake:
            self._wake = nbytes
            with contextlib.suppress(OSError):  # already closed
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes from the front of the buffers; returns their number, None if it would block.

        Fewer bytes are written only if the kernel accepts no more.

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
        """Reads into ``first``, then into ``then``; returns their number, None if it would block.

        Fewer bytes than there is space for mean that no more were available.

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
        """Shuts down sending; data that were written still arrive."""
        with contextlib.suppress(OSError):  # already broken
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()


class _TlsSocket(ssl.SSLSocket):
    """An SSLSocket that is closed if its peer ends before TLS starts.

    ``wrap_socket`` looks for early data then, and leaves the socket open if that raises.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receives like a plain SSLSocket, and closes a broken connection."""
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
        """Continues the handshake; returns None when done, else "read" or "write" to wait for.

        Raises:
          ConnectionEnded: If the handshake failed.
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

    def shut(self) -> None:
        """Shuts down sending; the keys stay, as ``SSLSocket.shutdown`` would not leave them."""
        with contextlib.suppress(OSError):  # already broken
            socket.socket.shutdown(self._tls, socket.SHUT_WR)

    def wake_at(self, nbytes: int) -> None:
        """As for a plain socket, except for parts of a record that the library has already read."""
        super().wake_at(max(1, nbytes - 2 * _TLS_RECORD_BYTES))

    def send(self, buffers: Sequence[memoryview]) -> int | None:
        """Writes from the front; a retry after a partial write must start with the same bytes."""
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
        """Reads record by record, since the selector does not see decrypted data."""
        got = 0
        for view in (first,) if then is None else (first, then):
            while view:
                try:
                    count = self._tls.recv_into(view)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return got or None
                except (ssl.SSLError, OSError) as error:
                    if got:
                        return got  # a broken connection raises again
                    raise ConnectionEnded(f"receiving failed: {explain(error)}") from error
                if count == 0:
                    if got:
                        return got
                    raise ConnectionEnded("the peer ended the connection")
                got += count
                view = view[count:]
        return got


def _one_record(buffers: Sequence[memoryview], index: int, offset: int) -> bytes:
    """Joins buffers up to a record: a record per header would cost a system call and a MAC."""
    parts: list[memoryview] = []
    room = _TLS_RECORD_BYTES
    for buffer in itertools.islice(buffers, index, None):
        parts.append(buffer[offset : offset + room])
        offset = 0
        room -= len(parts[-1])
        if room == 0:
            break
    return b"".join(parts)
