"""How fast a link sends: its emulated shape, the rate that the peer measures, and what follows."""

from __future__ import annotations

from comms.emulation.shaping import LinkShape, Shaper, chunk_bytes

_SLOW_BYTES_PER_S = 3e6
_FIRST_CHUNK_BYTES = 1 << 14
_FIRST_UNSENT_BYTES = 1 << 14
FIRST_FLIGHT_BYTES = 1 << 16
"""Until the first measurement comes back, at most this much is under way, in small chunks: what TCP
lets through while it looks for the rate of a slow link would only be dropped in its queues."""


class Pace:
    """Used by the I/O thread.

    Attributes:
      shaper: The emulated line; None sends as fast as the connection takes.
      rate_bytes: What the peer measured of our sending, in bytes per second; None before.
      chunk_bytes: The payload of a frame, at most.
    """

    def __init__(self) -> None:
        self.shaper: Shaper | None = None
        self.rate_bytes: float | None = None
        self.chunk_bytes = _FIRST_CHUNK_BYTES

    def share_shape(self, other: Pace) -> None:
        """Takes turns with another link on its emulated line, as links of one radio do."""
        self.shaper = other.shaper

    def set_shape(self, shape: LinkShape, now_s: float) -> None:
        """Shapes what is sent from now on."""
        self.shaper = None if shape.unlimited else Shaper(shape, now_s)
        self._resize_chunks(now_s)

    def set_rate(self, bytes_per_s: float, now_s: float) -> None:
        """Takes the peer's measurement of our sending, from which the chunks' size follows."""
        self.rate_bytes = bytes_per_s
        self._resize_chunks(now_s)

    def _resize_chunks(self, now_s: float) -> None:
        if self.shaper is not None:
            self.chunk_bytes = chunk_bytes(self.shaper.rate_bytes(now_s))
        elif self.rate_bytes is not None:
            # A link that shares the machine with a thousand others looks slow and is not: below
            # this size the work per frame would make it so.
            self.chunk_bytes = max(_FIRST_CHUNK_BYTES, chunk_bytes(self.rate_bytes))

    @property
    def unsent_limit_bytes(self) -> int:
        """How much may lie unsent in the kernel: what the link takes in about 12 ms.

        Nothing overtakes what lies there. On a fast link it is some megabytes, so that the kernel
        does not run dry before this thread comes round again.
        """
        rate = self.rate_bytes
        return (
            _FIRST_UNSENT_BYTES
            if rate is None
            else int(max(_FIRST_UNSENT_BYTES, min(rate / 80, 1 << 22)))
        )

    def in_flight_limit_bytes(self, rtt_s: float | None) -> int | None:
        """Returns how much a slow link should hold on its way; None on a fast one.

        TCP fills the queues before a slow link until they overflow, and a heartbeat then waits for
        what was dropped to be sent again. Twice the bandwidth-delay product leaves the estimate
        room to grow, 50 ms more keep the link busy.
        """
        rate = self.rate_bytes
        if self.shaper is not None or rate is None or rtt_s is None or rate > _SLOW_BYTES_PER_S:
            return None
        return int(min(max(FIRST_FLIGHT_BYTES, rate * (2 * rtt_s + 0.05)), 1 << 22))
