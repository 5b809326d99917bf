"""The gRPC-free TCP tensor channel: numpy arrays between processes, bounded and resumable.

Start with `Endpoint`: one per process. `listen` and `connect` give a `Link` per peer, which sends
tensors, bundles of weights and control messages and hands over each `Message` that arrives.
"""

from comms import bit_codec, block_codec, cast_codec  # noqa: F401 - imported to register codecs
from comms.allowance import Allowance
from comms.codec import Codec, Encoded, parse_codec, register
from comms.codec import names as codec_names
from comms.endpoint import Endpoint
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
from comms.frame import VERSION, Role, Tag
from comms.link import Link
from comms.message import Message, Payload
from comms.meter import LinkStats
from comms.options import ChannelOptions, Limits, TlsOptions
from comms.shaping import LinkShape, parse_link

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
    "Payload",
    "PeerClosed",
    "PeerLost",
    "Role",
    "Tag",
    "TlsOptions",
    "VersionError",
    "codec_names",
    "parse_codec",
    "parse_link",
    "register",
]
