"""An array in transit between a computation and a link: coded where it was computed.

Encoding is dispatched right behind the computation and before the copy to the host, so that fewer
bytes cross the bus of an accelerator; decoding is dispatched before the computation that consumes
the array. What a CPU encodes faster without a kernel is encoded by the link's codec worker, and
decoded where the parcel is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import numpy as np

from comms import Encoded, Message
from comms.arrays import Array
from pipar_jax.codec_kernels import kernels
from pipar_jax.codec_kernels.kernels import Coded

RAW = "raw"


class OutgoingTensor:
    """An outgoing array.

    Attributes:
      codec: Name of the codec, for ``Link.send`` in addition to the contents.
      ready: Becomes ready when the contents can be copied to the host.
      array_bytes: Bytes of the array itself.
    """

    def __init__(self, array: jax.Array, codec: str, samples: int) -> None:
        """Dispatches the encoding and the copy to the host; returns at once.

        Args:
          array: The computed array.
          codec: Name of the codec.
          samples: How many of its samples are sent, the first ones.
        """
        self.array_bytes, self._samples = array.nbytes, samples
        self._as_it_is = codec == RAW or kernels.on_host(codec)
        if not self._as_it_is and samples < len(array):
            array = array[:samples]
        self.codec, self._dtype, self._shape = codec, np.dtype(array.dtype), array.shape
        self.ready = Coded(array) if self._as_it_is else kernels.encoder(codec)(array)
        # How much of a payload is worth copying is only known with its length.
        known = self.ready.payload if self.ready.length is None else self.ready.length
        known.copy_to_host_async()

    def contents(self) -> np.ndarray | Encoded:  # type: ignore[type-arg]
        """Returns the contents for ``Link.send``; waits until they are ready."""
        data = kernels.to_host(self.ready)
        return (
            data[: self._samples]
            if self._as_it_is
            else Encoded(self.codec, data, self._dtype, self._shape)
        )


def open_parcel(message: Message, fill: Callable[[Array], Array] | None) -> jax.Array:
    """Returns the arrived array in transit to the device, where it is decoded if it was coded.

    Args:
      message: What has arrived.
      fill: Fills the array up to the size in which it is computed with; None: it is full.

    Raises:
      CodecError: The payload is not valid for its codec.
    """
    name = message.payload.codec.name
    if name == RAW or kernels.on_host(name):
        array = message.array
        placed: jax.Array = jax.device_put(array if fill is None else fill(array))
        return placed
    decoded = kernels.decode_from_link(message.payload)
    if fill is None:
        return decoded
    full: jax.Array = jax.device_put(fill(np.asarray(decoded)))
    return full


def compile_codecs(codecs: Iterable[str], shapes: Iterable[jax.ShapeDtypeStruct]) -> None:
    """Compiles the codecs for arrays of some shapes, before the first of them is sent."""
    shapes = list(shapes)
    for codec in set(codecs) - {RAW}:
        for shape in shapes if not kernels.on_host(codec) else ():
            kernels.compile_for(codec, shape)
