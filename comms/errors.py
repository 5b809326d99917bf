"""The errors of the tensor channel, with one root by which a caller can catch them all."""

from __future__ import annotations

import ssl


class ChannelError(Exception):
    """Root of the channel's errors; the message says what happened, where, and what to do."""


class ConnectError(ChannelError):
    """No connection to the peer could be opened within the time allowed."""


class BusyError(ConnectError):
    """The listener has too many unfinished connections; another attempt may succeed."""


class HandshakeError(ChannelError):
    """The peer answered, but the handshake failed."""


class VersionError(HandshakeError):
    """The peer uses another version of the protocol."""


class AuthenticationError(HandshakeError):
    """The shared token or the certificate of one side was not accepted by the other."""


class FrameError(ChannelError):
    """The peer sent bytes that are not a valid frame."""


class DamageError(FrameError):
    """Bytes were damaged in transit: a checksum does not match."""


class LimitError(FrameError):
    """A frame declares more than this side accepts; nothing was allocated for it."""


class CodecError(ChannelError):
    """A codec is unknown, or cannot represent an array."""


class PeerLost(ChannelError):
    """The link to a peer is gone: cut, silent for too long, or ended by a protocol error."""


class PeerClosed(PeerLost):
    """The peer closed its end of the link regularly."""


def explain(error: OSError) -> str:
    """Returns one line about an error of the system, or the text that it was raised with.

    Only errors of the system itself have an errno and ``strerror``; others, such as
    ``FileNotFoundError("put the file into data/")``, have their own text.
    """
    reason = getattr(error, "reason", None) if isinstance(error, ssl.SSLError) else None
    if reason:  # without the position in OpenSSL's source
        return str(reason).lower().replace("_", " ")
    return " ".join((error.strerror or str(error) or type(error).__name__).split())
