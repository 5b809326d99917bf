"""The codecs of comms as jit kernels, with identical bytes.

On an accelerator it is faster to encode before the copy to the host and to decode after the copy
back: a quarter of the bytes crosses the bus. ``encode`` and ``decode`` are pure functions of arrays
with static sizes and run under any ``jax.jit``; ``encoder`` and ``decoder`` return compiled ones by
the codec's name. The operations and their order are those of comms.codecs.block, comms.codecs.cast
and comms.codecs.bits, which describe the layouts; only NaNs may differ in their payload bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from comms import CodecError, Payload, parse_codec
from comms.arrays import Bytes, DType
from comms.codecs.bit_settings import Setting
from comms.codecs.bits import BitCodec
from comms.codecs.block import TINY, BlockCodec
from comms.codecs.cast import CastCodec
from pipar_jax.codec_kernels import bit_kernels
from pipar_jax.codec_kernels.bit_sections import from_bytes, to_bytes


class Coded(NamedTuple):
    """A payload on the accelerator.

    Attributes:
      payload: [n] uint8.
      length: Number of valid bytes, a scalar; None if all are valid.
    """

    payload: jax.Array
    length: jax.Array | None = None


def encode(array: jax.Array, codec: str) -> Coded:
    """Encodes an array.

    Args:
      array: Any shape, float32, float16 or bfloat16 (any type for "raw").
      codec: Name of the codec, such as "int8" or "int8:256".

    Returns:
      The same bytes as comms.

    Raises:
      CodecError: If there is no such codec or no kernel for it, or it does not support the dtype.
    """
    chosen, parameter = parse_codec(codec)
    chosen.check(np.dtype(array.dtype), parameter)
    if isinstance(chosen, BitCodec):
        return Coded(*bit_kernels.encode(array, Setting.of(parameter)))
    if isinstance(chosen, BlockCodec):
        return Coded(_encode_blocks(array, chosen, parameter))
    if isinstance(chosen, CastCodec):
        return Coded(to_bytes(array.astype(chosen.narrow)))
    if chosen.name == "raw":
        return Coded(to_bytes(array))
    raise CodecError(f"codec {chosen.name} has no jit kernel; encode it with comms")


def decode(payload: jax.Array, codec: str, dtype: DType, shape: tuple[int, ...]) -> jax.Array:
    """Decodes a payload.

    Args:
      payload: [n] uint8; of maximum size if the size depends on the array.
      codec: Name of the codec, with its parameter if that is not the default.
      dtype: Element type before encoding.
      shape: Shape before encoding.

    Returns:
      The array, as comms decodes it.

    Raises:
      CodecError: As in ``encode``.
    """
    chosen, parameter = parse_codec(codec)
    chosen.check(dtype, parameter)
    if isinstance(chosen, BitCodec):
        return bit_kernels.decode(payload, Setting.of(parameter), dtype, shape)
    if isinstance(chosen, BlockCodec):
        return _decode_blocks(payload, chosen, parameter, dtype, shape)
    if isinstance(chosen, CastCodec):
        return from_bytes(payload, chosen.narrow).astype(dtype).reshape(shape)
    if chosen.name == "raw":
        return from_bytes(payload, dtype).reshape(shape)
    raise CodecError(f"codec {chosen.name} has no jit kernel; decode it with comms")


@functools.cache
def encoder(codec: str) -> Callable[[jax.Array], Coded]:
    """Returns the compiled encoder of a codec, one for all shapes (each compiles once)."""
    return jax.jit(functools.partial(encode, codec=codec))


@functools.cache
def decoder(codec: str, dtype: DType, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns the compiled decoder of a codec for one type and shape."""
    return jax.jit(functools.partial(decode, codec=codec, dtype=dtype, shape=shape))


def on_host(codec: str) -> bool:
    """Returns whether comms codes faster than a kernel: on a CPU there is no bus to relieve.

    There the kernels of the bit-level codec, whose sizes depend on the array, take five to ten
    times as long as numpy, and occupy the processor.
    """
    return isinstance(parse_codec(codec)[0], BitCodec) and jax.default_backend() == "cpu"


def to_host(coded: Coded) -> Bytes:
    """Copies a payload to the host; waits for it.

    If the length depends on the array, it is rounded up to a 16th of the maximum, since each size
    that is copied is compiled.
    """
    if coded.length is None:
        return np.asarray(coded.payload)
    length = int(coded.length)
    if _on_cpu(coded.payload):
        return np.asarray(coded.payload)[:length]
    nbytes = _rounded(length, coded.payload.size)
    return np.asarray(_front(coded.payload, nbytes))[:length]


def to_device(data: Bytes, most: int) -> jax.Array:
    """Copies a payload to the default accelerator and pads it to its maximum size."""
    nbytes = _rounded(data.size, most)
    filled = np.zeros(nbytes, np.uint8)
    filled[: data.size] = data
    placed: jax.Array = _filled_up(jnp.asarray(filled), most)
    return placed


def decode_from_link(payload: Payload) -> jax.Array:
    """Copies a received payload to the default accelerator and decodes it there.

    Raises:
      CodecError: If the payload is not valid for the codec.
    """
    chosen, parameter, dtype, shape = (
        payload.codec, payload.parameter, payload.dtype, payload.shape,
    )  # fmt: skip
    codec = f"{chosen.name}:{parameter}" if parameter else chosen.name
    payload.check()
    if chosen.exact_size:
        data = jnp.asarray(payload.data)
    else:
        data = to_device(payload.data, chosen.encoded_bytes(dtype, shape, parameter))
    return decoder(codec, dtype, shape)(data)


def compile_for(codec: str, shape: jax.ShapeDtypeStruct) -> None:
    """Compiles all kernels for arrays of a shape on this accelerator."""
    coded = encoder(codec)(jnp.ones(shape.shape, shape.dtype))
    decode = decoder(codec, np.dtype(shape.dtype), shape.shape)
    decode(coded.payload).block_until_ready()
    most = coded.payload.size
    for part in range(1, _PARTS + 1) if coded.length is not None else ():
        nbytes = _rounded(part * most // _PARTS, most)
        _filled_up(_front(coded.payload, nbytes), most).block_until_ready()


_PARTS = 16


def _rounded(nbytes: int, most: int) -> int:
    """Returns a size rounded up to a 16th of its maximum."""
    part = -(-most // _PARTS)
    return min(-(-nbytes // part) * part, most)


@functools.partial(jax.jit, static_argnums=1)
def _front(payload: jax.Array, nbytes: int) -> jax.Array:
    return payload[:nbytes]


@functools.partial(jax.jit, static_argnums=1)
def _filled_up(payload: jax.Array, most: int) -> jax.Array:
    return jnp.pad(payload, (0, most - payload.size))


def _on_cpu(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def _encode_blocks(array: jax.Array, codec: BlockCodec, size: int) -> jax.Array:
    flat = array.reshape(-1).astype(jnp.float32)
    count = flat.size
    block = jnp.pad(flat, (0, -count % size)).reshape(-1, size)
    top = jnp.max(jnp.abs(block), axis=1)
    usable = (top >= TINY) & (top < jnp.inf)
    # A divisor of 1 where it is not used avoids infinities in discarded results.
    factor = jnp.where(usable, codec.top / jnp.where(usable, top, 1), 0)
    scale = jnp.where(usable, top * (np.float32(1) / codec.top), 0)
    scale = jnp.where(top < jnp.inf, scale, jnp.nan).astype(jnp.float32)
    scaled = jnp.where(usable[:, None], block * factor[:, None], 0)
    if codec.rounds:
        scaled = jnp.rint(scaled)
    if codec.bits == 4:
        nibbles = (scaled + 8).astype(jnp.uint8).reshape(-1)
        codes = (nibbles[0::2] | (nibbles[1::2] << 4))[: -(-count // 2)]
    else:
        codes = to_bytes(scaled.astype(codec.narrow))[:count]
    return jnp.concatenate([to_bytes(scale), codes])


def _decode_blocks(
    payload: jax.Array,
    codec: BlockCodec,
    size: int,
    dtype: DType,
    shape: tuple[int, ...],
) -> jax.Array:
    count = math.prod(shape)
    blocks = -(-count // size)
    scale = from_bytes(payload[: 4 * blocks], np.dtype(np.float32))
    body = payload[4 * blocks :]
    if codec.bits == 4:
        codes = jnp.stack([body & 15, body >> 4], axis=1).reshape(-1)[:count]
        values = codes.astype(jnp.float32) - 8
    else:
        values = from_bytes(body, codec.narrow).astype(jnp.float32)
    values = jnp.pad(values, (0, -count % size)).reshape(-1, size) * scale[:, None]
    return values.reshape(-1)[:count].astype(dtype).reshape(shape)
