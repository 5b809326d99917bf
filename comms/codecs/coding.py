"""Arrays that are coded once for several links, and what their receivers make of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from comms.arrays import Array, DType
from comms.codecs.base import RAW, Codec, Encoded, parse_codec
from comms.errors import CodecError


def supports(codec: Codec, dtype: DType, parameter: int) -> bool:
    """Returns whether a codec takes arrays of an element type; a bundle sends others raw."""
    try:
        codec.check(dtype, parameter)
    except CodecError:
        return False
    return True


def contiguous(array: Array) -> Array:
    """Returns the array in C order and little-endian, copied only if necessary."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array if array.flags.c_contiguous else array.copy(order="C")


def encoded(arrays: Mapping[str, Array], codec: str) -> dict[str, Array | Encoded]:
    """Returns arrays as a bundle carries them: coded where the codec supports their element type.

    ``Link.send_bundle`` sends what is returned, and so the same bytes as if it had been given the
    arrays and the codec; but each array is coded once, however many links it goes over.

    Args:
      arrays: Arrays of any shape by name.
      codec: Name of the codec, such as "raw" or "int8:128".

    Raises:
      CodecError: There is no such codec.
    """
    chosen, parameter = parse_codec(codec)
    found: dict[str, Array | Encoded] = {}
    for name, one in arrays.items():
        array = contiguous(np.asarray(one))
        found[name] = array
        if chosen is not RAW and supports(chosen, array.dtype, parameter):
            payload = chosen.encode(array, parameter)
            found[name] = Encoded(codec, payload, array.dtype, array.shape)
    return found


def decoded(arrays: Mapping[str, Array | Encoded]) -> dict[str, Array]:
    """Returns arrays as whoever receives them reads them.

    Args:
      arrays: What ``encoded`` returned, or some of it.

    Raises:
      CodecError: A payload is not one of its codec.
    """
    found = {}
    for name, one in arrays.items():
        if isinstance(one, Encoded):
            codec, parameter = parse_codec(one.codec)
            found[name] = codec.decode(one.data, one.dtype, one.shape, parameter)
        else:
            found[name] = one
    return found
