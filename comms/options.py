"""The settings of a channel, from which all other numbers derive."""

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
    """Limits on memory that a peer can occupy on this side; checked before allocation.

    Attributes:
      message_bytes: Largest tensor payload, before and after the codec, and largest sum of a
        bundle's tensors.
      control_bytes: Largest control message or bundle manifest.
      join_bytes: Largest control message of a peer that has not been admitted yet.
      rank: Largest number of dimensions.
      bundle_tensors: Most tensors in one bundle.
      waiting_bytes: Maximum size of messages that wait on a link before its owner starts it.
      pending_handshakes: Maximum number of connections of a listener that have not finished their
        handshake or are not admitted; beyond it the oldest is closed.
      address_handshakes: The same for one address; at least twice the peers that
        ``Endpoint.listen`` expects.
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
      deadline_s: Seconds after which a peer that sends nothing, or accepts no bytes, is lost. The
        intervals of heartbeats, the time limit of handshakes and the back-off of reconnects derive
        from it.
      window_bytes: Credit for activations and cotangents that this side grants a peer; an empty
        window accepts one tensor of any size.
      resume_s: Seconds for which a broken link may be down while the connecting side reconnects and
        the stream resumes; 0 ends a link with its connection. The smaller of both sides' values
        applies. Above 0, ``on_sent`` is called when the peer has acknowledged the tensor, because
        the sender's array is the replay buffer until then.
      replay_bytes: Maximum number of unacknowledged bytes per link when ``resume_s`` > 0.
      token: Shared secret that both sides must prove; None requires no proof.
      tls: Certificates; None sends unencrypted.
      listen_openly: Allows a listener without a token beyond the loopback interface.
      limits: Limits on memory that a peer can occupy.
      pool_bytes: Maximum size of idle receive buffers kept for reuse; 0 disables reuse.
      checksum: Whether payloads have a checksum, which they do if either side requests it; None
        means yes without TLS, which has its own, and no with TLS. A damaged payload is sent again
        if the stream can resume, and otherwise ends the link.
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
          ChannelError: If a value is not valid.
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
                "the token is too short: use at least 8 characters, preferably random"
            )

    @property
    def wants_checksum(self) -> bool:
        """Whether this side requests checksums."""
        return self.tls is None if self.checksum is None else self.checksum

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats."""
        return min(1.0, self.deadline_s / 10)

    @property
    def silence_s(self) -> float:
        """Seconds of silence after which a peer is lost, so that its loss is reported in time."""
        return 0.8 * self.deadline_s
