"""The interface of a stream's endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from comms.options import ChannelOptions
from comms.wire.buffers import BufferPool
from comms.wire.event_loop import Loop

if TYPE_CHECKING:
    from comms.link.stream import Stream


class StreamOwner(Protocol):
    """What a stream needs of its endpoint."""

    @property
    def options(self) -> ChannelOptions:
        """Settings of all its streams."""

    @property
    def loop(self) -> Loop:
        """The I/O thread."""

    @property
    def pool(self) -> BufferPool:
        """Pool of receive buffers."""

    def redial(self, stream: Stream) -> None:
        """Attempts to resume an interrupted stream."""

    def forget(self, stream: Stream) -> None:
        """Drops a stream that has ended."""
