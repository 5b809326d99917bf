"""The errors of the tensor channel: one root, so that a caller can catch them all by one name."""

from __future__ import annotations

import ssl


class ChannelError(Exception):
    """Anything the channel refuses or loses; the message says what, where and what to do."""


class ConnectError(ChannelError):
    """No connection to the peer could be opened within the time allowed."""


class BusyError(ConnectError):
    """The listener has too many unfinished connections; another try may find it free."""


class HandshakeError(ChannelError):
    """The peer answered, but the two do not agree to talk."""


class VersionError(HandshakeError):
    """The peer speaks another version of the protocol."""


class AuthenticationError(HandshakeError):
    """The shared token or the certificate of one side was not accepted by the other."""


class FrameError(ChannelError):
    """The peer sent bytes that are no valid frame."""


class DamageError(FrameError):
    """Bytes were changed on their way: a checksum does not match."""


class LimitError(FrameError):
    """A frame declares more than this side is willing to take; nothing was allocated for it."""


class CodecError(ChannelError):
    """A codec is unknown, or cannot represent what it was given."""


class PeerLost(ChannelError):
    """The link to a peer is gone: cut, silent for too long, or ended by a protocol error."""


class PeerClosed(PeerLost):
    """The peer said goodbye and closed its end of the link in good order."""


def explain(error: OSError) -> str:
    """Returns in one line what an error of the system says, or what it was raised with.

    Only errors of the system itself have a number with words to it; ``strerror`` of any other,
    such as ``FileNotFoundError("put the file into data/")``, is None. Its own text counts then.
    """
    reason = getattr(error, "reason", None) if isinstance(error, ssl.SSLError) else None
    if reason:  # without the position in OpenSSL's source
        return str(reason).lower().replace("_", " ")
    return " ".join((error.strerror or str(error) or type(error).__name__).split())
