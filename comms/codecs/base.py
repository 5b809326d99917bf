"""The protocol of codecs, their registry, and ``raw``.

A codec converts an array to bytes and back. Its number and parameter are in the header, so that
sender and receiver need no prior agreement. It is selected by name: ``int8``, or ``int8:256`` with
a parameter, which may also be a word: ``bits:lossless``. Encoding and decoding are plain functions
of numpy arrays, vectorised, and run on the codec worker or on the thread that asks for the array,
never on the I/O thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from comms.arrays import Array, Bytes, DType
from comms.errors import CodecError
from comms.wire.frame import array_bytes


class Codec(Protocol):
    """A named conversion of arrays to bytes and back.

    Attributes:
      name: Name by which it is selected, in lower case.
      code: Its number on the wire, 1 to 255 (0 is raw).
      default_parameter: The parameter where none is given.
    """

    @property
    def name(self) -> str:
        """Name by which it is selected."""

    @property
    def code(self) -> int:
        """Its number on the wire."""

    @property
    def default_parameter(self) -> int:
        """The parameter where none is given."""

    def parameter_of(self, text: str) -> int:
        """Returns the parameter for a text after the colon that is not a number.

        Raises:
          CodecError: If the text is not a parameter.
        """

    def precision_bits(self, parameter: int) -> int | None:
        """Returns the bits of an element, including the sign, relative to the largest nearby.

        None if the codec is lossless, or its loss has a bound chosen by the caller.
        """

    def check(self, dtype: DType, parameter: int) -> None:
        """Raises CodecError unless the codec supports this dtype and parameter."""

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns the payload [n] uint8 of a C-contiguous array."""

    def decode(self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int) -> Array:
        """Returns the array of this type and shape; the inverse of ``encode`` up to its loss."""

    def check_payload(
        self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> None:
        """Raises CodecError unless ``decode`` can read a payload.

        Called where a payload arrives, on the I/O thread: it reads no more of it than that takes.
        """

    def encoded_bytes(self, dtype: DType, shape: tuple[int, ...], parameter: int) -> int:
        """Returns the payload's size without encoding: exact if ``exact_size``, else a maximum."""

    @property
    def exact_size(self) -> bool:
        """Whether ``encoded_bytes`` is exact; else it is an upper bound."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An array encoded elsewhere, such as by a kernel on the accelerator, for ``Link.send``.

    Attributes:
      codec: Name of the codec, with its parameter if that is not the default.
      data: The payload, [n] uint8.
      dtype: Element type before encoding.
      shape: Shape before encoding.
    """

    codec: str
    data: Bytes
    dtype: DType
    shape: tuple[int, ...]


class Raw:
    """The unchanged bytes, in little-endian order."""

    name = "raw"
    code = 0
    default_parameter = 0
    exact_size = True

    def parameter_of(self, text: str) -> int:
        """Accepts no words."""
        raise no_such_parameter(self.name, text)

    def precision_bits(self, parameter: int) -> int | None:
        """Lossless."""
        return None

    def check(self, dtype: DType, parameter: int) -> None:
        """Accepts all dtypes of the wire format and no parameter."""
        if parameter != 0:
            raise CodecError(f"codec raw takes no parameter, got {parameter}")

    def encode(self, array: Array, parameter: int) -> Bytes:
        """Returns a view of the array's bytes."""
        return array.reshape(-1).view(np.uint8)

    def decode(self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int) -> Array:
        """Returns a view of the payload as the array.

        Raises:
          CodecError: As in ``check_payload``.
        """
        self.check_payload(payload, dtype, shape, parameter)
        return payload.view(dtype).reshape(shape)

    def check_payload(
        self, payload: Bytes, dtype: DType, shape: tuple[int, ...], parameter: int
    ) -> None:
        """Checks the values of bools: all other bytes are some array.

        Raises:
          CodecError: If a bool is neither 0 nor 1, which numpy and XLA interpret differently.
        """
        if dtype == np.bool_ and payload.size and payload.max() > 1:
            raise CodecError(f"a bool of value {payload.max()}, expected 0 or 1")

    def encoded_bytes(self, dtype: DType, shape: tuple[int, ...], parameter: int) -> int:
        """Returns the array's own size."""
        return array_bytes(dtype, shape)


RAW = Raw()
_BY_NAME: dict[str, Codec] = {}
_BY_CODE: dict[int, Codec] = {}


def register(codec: Codec) -> Codec:
    """Adds a codec under its name and number and returns it.

    Raises:
      CodecError: If either is taken or the number exceeds a byte.
    """
    if codec.name in _BY_NAME or codec.code in _BY_CODE:
        raise CodecError(f"codec {codec.name} ({codec.code}) is already registered")
    if not 0 <= codec.code <= 255:
        raise CodecError(f"codec {codec.name}: its number {codec.code} exceeds one byte")
    _BY_NAME[codec.name] = codec
    _BY_CODE[codec.code] = codec
    return codec


register(RAW)


def names() -> tuple[str, ...]:
    """Returns the names of all registered codecs."""
    return tuple(_BY_NAME)


def parse_codec(text: str) -> tuple[Codec, int]:
    """Returns the codec and parameter that a text such as ``int8`` or ``int8:256`` names.

    Raises:
      CodecError: If there is no such codec, or it has no such parameter.
    """
    name, colon, parameter = text.partition(":")
    codec = _BY_NAME.get(name)
    if codec is None:
        raise CodecError(f"unknown codec {name!r}; known are {', '.join(_BY_NAME)}")
    if not colon:
        return codec, codec.default_parameter
    if parameter.isdecimal():
        return codec, int(parameter)
    return codec, codec.parameter_of(parameter)


def no_such_parameter(name: str, text: str) -> CodecError:
    """Returns the error for a parameter that has to be a number."""
    return CodecError(f"codec '{name}:{text}': the parameter after the colon must be a number")


def codec_of(code: int) -> Codec:
    """Returns the codec of a wire number.

    Raises:
      CodecError: If no codec with that number is registered.
    """
    codec = _BY_CODE.get(code)
    if codec is None:
        raise CodecError(f"the peer used codec {code}, which this side does not have")
    return codec
