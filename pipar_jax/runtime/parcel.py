"""An array on its way between a computation and a link: coded where it was computed.

Encoding is dispatched right behind the computation and before the copy to the host, so that fewer
bytes cross the bus of an accelerator; decoding is dispatched before the computation that consumes
the array.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from comms import Encoded, Message
from pipar_jax import codec_kernels

RAW = "raw"


class Parcel:
    """An array that will be sent.

    Attributes:
      ready: Becomes ready when the array, encoded, can be copied to the host.
      array_bytes: Bytes of the array itself.
    """

    def __init__(self, array: jax.Array, codec: str) -> None:
        """Dispatches the encoding and the copy to the host; returns at once.

        Args:
          array: What was just computed.
          codec: Name of the codec.
        """
        self._codec, self._dtype, self._shape = codec, np.dtype(array.dtype), array.shape
        self.array_bytes = array.nbytes
        self.ready = array if codec == RAW else codec_kernels.encoder(codec)(array)
        self.ready.copy_to_host_async()

    def contents(self) -> np.ndarray | Encoded:  # type: ignore[type-arg]
        """Returns what ``Link.send`` takes; waits until it is ready."""
        data = np.asarray(self.ready)
        return data if self._codec == RAW else Encoded(self._codec, data, self._dtype, self._shape)


def open_parcel(message: Message) -> jax.Array:
    """Returns the array that arrived, on its way to the device; decoded there if it was coded."""
    if message.payload.codec.name == RAW:
        placed: jax.Array = jax.device_put(message.array)
        return placed
    return codec_kernels.decode_from_link(message.payload)


def compile_codecs(codecs: Iterable[str], shapes: Iterable[jax.ShapeDtypeStruct]) -> None:
    """Compiles what coding arrays of some shapes needs, before the first of them is sent."""
    shapes = list(shapes)
    for codec in set(codecs) - {RAW}:
        for shape in shapes:
            payload = codec_kernels.encoder(codec)(jnp.ones(shape.shape, shape.dtype))
            decode = codec_kernels.decoder(codec, np.dtype(shape.dtype), shape.shape)
            decode(payload).block_until_ready()
