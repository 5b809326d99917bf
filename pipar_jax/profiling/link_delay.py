"""Measures the cost of a message in addition to its bytes, on a separate link."""

from __future__ import annotations

import queue
import statistics
import time

import numpy as np

from comms import Endpoint, Link, LinkShape, Message, Role, Tag
from pipar_jax.errors import PeerError

_TIMEOUT_S = 10.0


def measure_delay_s(shape: LinkShape, nbytes: int, repeats: int = 9) -> float:
    """Returns the seconds from sending a tensor until its arrival, less bytes / rate.

    Two endpoints in this process communicate over loopback without other traffic, so that the
    result is the emulated delay, the wake-ups of threads, and copies.

    Args:
      shape: Shape of the link.
      nbytes: Bytes of the tensor.
      repeats: Number of messages, sent one after another; the result is the median.

    Raises:
      PeerError: A message did not arrive.
    """
    arrived: queue.SimpleQueue[float] = queue.SimpleQueue()
    array = np.zeros(max(nbytes // 4, 1), np.float32)
    wire_s = 0.0 if shape.rate_mbps is None else array.nbytes * 8 / (shape.rate_mbps * 1e6)

    def take(message: Message) -> None:
        arrived.put(message.received_s)
        message.release()

    def accept(link: Link) -> None:
        link.admit()
        link.start(take, _ignore, _ignore)

    delays = []
    with Endpoint("probe-server") as server, Endpoint("probe-device") as device:
        host, port = server.listen("127.0.0.1", 0, accept)
        link = device.connect(host, port, name_of_peer="probe-server", timeout_s=_TIMEOUT_S)
        link.start(_ignore, _ignore, _ignore)
        link.set_shape(shape)
        for number in range(repeats):
            began_s = time.monotonic()
            link.send(Tag(role=Role.ACTIVATION, step=number), array)
            try:
                delays.append(arrived.get(timeout=_TIMEOUT_S + wire_s) - began_s - wire_s)
            except queue.Empty:
                raise PeerError(
                    f"a probe of {array.nbytes} bytes did not arrive over loopback within "
                    f"{_TIMEOUT_S + wire_s:.0f} s: is the machine overloaded?"
                ) from None
    return max(statistics.median(delays), 0.0)


def _ignore(*_: object) -> None:
    """Ignores an event."""
