"""The TCP tensor channel without gRPC: numpy arrays between processes, bounded and resumable.

Start with ``Endpoint``: one per process. ``listen`` and ``connect`` give a ``Link`` per peer, which
sends tensors, bundles of weights and control messages, and delivers each ``Message`` that arrives.
"""

from comms.codecs import bits, block, cast  # noqa: F401 - imported to register codecs
from comms.codecs.base import Codec, Encoded, parse_codec, register
from comms.codecs.base import names as codec_names
from comms.codecs.coding import decoded, encoded
from comms.emulation.shaping import LinkShape, parse_link
from comms.errors import (
    AuthenticationError,
    ChannelError,
    CodecError,
    ConnectError,
    FrameError,
    HandshakeError,
    LimitError,
    PeerClosed,
    PeerLost,
    VersionError,
)
from comms.link.allowance import Allowance
from comms.link.endpoint import Endpoint
from comms.link.link import Link
from comms.link.message import Message, MessageKind, Payload
from comms.link.meter import LinkStats
from comms.options import ChannelOptions, Limits, TlsOptions
from comms.wire.frame import VERSION, Role, Tag

__all__ = [
    "VERSION",
    "Allowance",
    "AuthenticationError",
    "ChannelError",
    "ChannelOptions",
    "Codec",
    "CodecError",
    "ConnectError",
    "Encoded",
    "Endpoint",
    "FrameError",
    "HandshakeError",
    "LimitError",
    "Limits",
    "Link",
    "LinkShape",
    "LinkStats",
    "Message",
    "MessageKind",
    "Payload",
    "PeerClosed",
    "PeerLost",
    "Role",
    "Tag",
    "TlsOptions",
    "VersionError",
    "codec_names",
    "decoded",
    "encoded",
    "parse_codec",
    "parse_link",
    "register",
]
