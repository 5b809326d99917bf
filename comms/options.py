"""What can be set on a channel, with the few numbers that everything else derives from."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from comms.errors import ChannelError


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Certificates of one side, PEM files; TLS 1.3 only.

    Attributes:
      authority: The certificates that the peer's must be signed by.
      certificate: This side's certificate; a listener needs one.
      key: The private key of ``certificate``.
      require_peer: Whether a listener asks connecting peers for a certificate too.
      server_name: The name to expect in the listener's certificate, if not the host connected to.
    """

    authority: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    require_peer: bool = False
    server_name: str | None = None

    def server_context(self) -> ssl.SSLContext:
        """Returns the context for a listener.

        Raises:
          ChannelError: If a file is missing or unreadable.
        """
        if self.certificate is None:
            raise ChannelError("TLS on a listener needs a certificate and its key")
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        if self.require_peer:
            if self.authority is None:
                raise ChannelError("require_peer needs the authority that signs the peers")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """Returns the context for a connecting side, which always verifies the listener.

        Raises:
          ChannelError: If a file is missing or unreadable.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            if self.authority is not None:
                context.load_verify_locations(str(self.authority))
            elif protocol == ssl.PROTOCOL_TLS_CLIENT:
                context.load_default_certs()
            if self.certificate is not None:
                key = None if self.key is None else str(self.key)
                context.load_cert_chain(str(self.certificate), key)
        except (OSError, ssl.SSLError) as error:
            raise ChannelError(
                f"cannot load the TLS files {self.authority}, {self.certificate}, {self.key}: "
                f"{error}; check the paths and that they are PEM files that belong together"
            ) from error
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer may make this side hold; checked before anything is allocated.

    Attributes:
      message_bytes: Largest tensor payload, before and after the codec, and largest sum of a
        bundle's tensors.
      control_bytes: Largest control message or bundle manifest.
      join_bytes: Largest control message of a peer that has not been admitted yet.
      rank: Largest number of dimensions.
      bundle_tensors: Most tensors in one bundle.
      waiting_bytes: What may wait on a link that its owner has not started yet.
      pending_handshakes: Connections of a listener that have not finished their handshake, or
        were not admitted since; from one address at most ``address_handshakes``, or twice the
        peers that ``Endpoint.listen`` was told to expect. Of too many the oldest loses.
      address_handshakes: See there.
    """

    message_bytes: int = 16 << 30
    control_bytes: int = 8 << 20
    join_bytes: int = 1 << 20
    rank: int = 16
    bundle_tensors: int = 100_000
    waiting_bytes: int = 64 << 20
    pending_handshakes: int = 2048
    address_handshakes: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions:
    """Settings of an Endpoint.

    Attributes:
      deadline_s: A peer that is silent, or takes no bytes, for this long is lost. Heartbeats, the
        handshake's time limit and the back-off of reconnects derive from it.
      window_bytes: Activation and cotangent bytes that this side lets a peer send before it
        releases some; one tensor of any size always fits an empty window.
      resume_s: How long a cut link may stay down while the connecting side reconnects and the
        stream resumes; 0 ends a link when its connection ends. The smaller of the two sides'
        values counts. Above 0, ``on_sent`` is called when the peer has acknowledged the tensor,
        because the sender's array is the replay buffer until then.
      replay_bytes: Most bytes sent and not yet acknowledged, per link, when ``resume_s`` > 0.
      token: Shared secret that both sides must prove; None asks for no proof.
      tls: Certificates; None sends in the clear.
      listen_openly: Allows a listener without a token beyond the loopback interface.
      limits: What a peer may make this side hold.
      pool_bytes: Most bytes of idle receive buffers kept for reuse; 0 allocates each afresh.
      checksum: Whether payloads travel with a checksum, which they do if either side says so;
        None is yes without TLS, which has its own, and no under it. A payload that arrives
        damaged is sent again where the stream can resume, and ends the link where it cannot.
    """

    deadline_s: float = 10.0
    window_bytes: int = 64 << 20
    resume_s: float = 0.0
    replay_bytes: int = 32 << 20
    token: str | None = field(default=None, repr=False)
    tls: TlsOptions | None = None
    listen_openly: bool = False
    limits: Limits = field(default_factory=Limits)
    pool_bytes: int = 64 << 20
    checksum: bool | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ChannelError: If one makes no sense.
        """
        if not self.deadline_s > 0:
            raise ChannelError(f"deadline_s must be positive, got {self.deadline_s}")
        if self.resume_s < 0:
            raise ChannelError(f"resume_s must be 0 or more, got {self.resume_s}")
        for name in ("window_bytes", "replay_bytes"):
            if getattr(self, name) < 1:
                raise ChannelError(f"{name} must be positive, got {getattr(self, name)}")
        if self.pool_bytes < 0:
            raise ChannelError(f"pool_bytes must be 0 or more, got {self.pool_bytes}")
        if self.token is not None and len(self.token) < 8:
            raise ChannelError(
                "the token is too short: use at least 8 characters, best random ones"
            )

    @property
    def wants_checksum(self) -> bool:
        """Whether this side asks for checksums."""
        return self.tls is None if self.checksum is None else self.checksum

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats."""
        return min(1.0, self.deadline_s / 10)

    @property
    def silence_s(self) -> float:
        """Seconds of silence after which a peer is lost, so that the news is out in time."""
        return 0.8 * self.deadline_s
