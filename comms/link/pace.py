"""The rate of a link's sending: emulated shape, measured rate, and derived sizes."""

from __future__ import annotations

from comms.emulation.shaping import LinkShape, Shaper, chunk_bytes

_SLOW_BYTES_PER_S = 3e6
_FIRST_CHUNK_BYTES = 1 << 14
_FIRST_UNSENT_BYTES = 1 << 14
FIRST_FLIGHT_BYTES = 1 << 16
"""Limit of data in flight, in small chunks, before the first measurement: TCP's probing for the
rate of a slow link would only overflow its queues."""


class Pace:
    """Used by the I/O thread.

    Attributes:
      shaper: The emulated line; None sends as fast as the connection takes.
      rate_bytes: Rate of our sending measured by the peer, in bytes per second; None before.
      chunk_bytes: Maximum payload of a frame.
    """

    def __init__(self) -> None:
        self.shaper: Shaper | None = None
        self.rate_bytes: float | None = None
        self.chunk_bytes = _FIRST_CHUNK_BYTES

    def share_shape(self, other: Pace) -> None:
        """Shares the emulated line of another link, as links of one radio do."""
        self.shaper = other.shaper

    def set_shape(self, shape: LinkShape, now_s: float) -> None:
        """Shapes what is sent from now on."""
        self.shaper = None if shape.unlimited else Shaper(shape, now_s)
        self._resize_chunks(now_s)

    def set_rate(self, bytes_per_s: float, now_s: float) -> None:
        """Sets the rate measured by the peer, and the chunk size that follows from it."""
        self.rate_bytes = bytes_per_s
        self._resize_chunks(now_s)

    def _resize_chunks(self, now_s: float) -> None:
        if self.shaper is not None:
            self.chunk_bytes = chunk_bytes(self.shaper.rate_bytes(now_s))
        elif self.rate_bytes is not None:
            # A link that shares the machine with a thousand others appears slow: with smaller
            # chunks the work per frame would make it slow.
            self.chunk_bytes = max(_FIRST_CHUNK_BYTES, chunk_bytes(self.rate_bytes))

    @property
    def unsent_limit_bytes(self) -> int:
        """Limit of unsent data in the kernel: about 12 ms of the link.

        Nothing overtakes these data. On a fast link the limit is several megabytes, so that the
        kernel does not run out of data before this thread runs again.
        """
        rate = self.rate_bytes
        return (
            _FIRST_UNSENT_BYTES
            if rate is None
            else int(max(_FIRST_UNSENT_BYTES, min(rate / 80, 1 << 22)))
        )

    def in_flight_limit_bytes(self, rtt_s: float | None) -> int | None:
        """Returns the limit of data in flight on a slow link; None on a fast one.

        TCP fills the queues before a slow link until they overflow, and heartbeats then wait for
        retransmissions. Twice the bandwidth-delay product lets the estimate grow; 50 ms more keep
        the link busy.
        """
        rate = self.rate_bytes
        if self.shaper is not None or rate is None or rtt_s is None or rate > _SLOW_BYTES_PER_S:
            return None
        return int(min(max(FIRST_FLIGHT_BYTES, rate * (2 * rtt_s + 0.05)), 1 << 22))
