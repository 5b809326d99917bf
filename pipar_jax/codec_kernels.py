"""The codecs of comms as jit kernels, which give the same bytes.

On an accelerator it pays to encode before the copy to the host and to decode after the copy back:
a quarter of the bytes crosses the bus. `encode` and `decode` are pure functions of arrays with
static sizes and run under any `jax.jit`; `encoder` and `decoder` return compiled ones by the
codec's name. The operations and their order are those of comms.block_codec and comms.cast_codec,
which describe the layouts; only NaNs may differ in their payload bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comms import CodecError, Encoded, Payload, parse_codec
from comms.block_codec import TINY, BlockCodec
from comms.cast_codec import CastCodec


def encode(array: jax.Array, codec: str) -> jax.Array:
    """Encodes an array.

    Args:
        array: any shape, float32, float16 or bfloat16 (any type for "raw").
        codec: name of the codec, such as "int8" or "int8:256".

    Returns:
        The payload, [n] uint8, the same bytes that comms makes.

    Raises:
        CodecError: if there is no such codec or no kernel for it, or it does not take the type.
    """
    chosen, parameter = parse_codec(codec)
    chosen.check(np.dtype(array.dtype), parameter)
    if isinstance(chosen, BlockCodec):
        return _encode_blocks(array, chosen, parameter)
    if isinstance(chosen, CastCodec):
        return _to_bytes(array.astype(chosen.narrow))
    if chosen.name == "raw":
        return _to_bytes(array)
    raise CodecError(f"codec {chosen.name} has no jit kernel; encode it with comms")


def decode(
    payload: jax.Array, codec: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> jax.Array:
    """Decodes a payload.

    Args:
        payload: [n] uint8.
        codec: name of the codec, with its parameter if that is not the default.
        dtype: element type before encoding.
        shape: shape before encoding.

    Returns:
        The array, as comms decodes it.

    Raises:
        CodecError: as in `encode`.
    """
    chosen, parameter = parse_codec(codec)
    chosen.check(dtype, parameter)
    if isinstance(chosen, BlockCodec):
        return _decode_blocks(payload, chosen, parameter, dtype, shape)
    if isinstance(chosen, CastCodec):
        return _from_bytes(payload, chosen.narrow).astype(dtype).reshape(shape)
    if chosen.name == "raw":
        return _from_bytes(payload, dtype).reshape(shape)
    raise CodecError(f"codec {chosen.name} has no jit kernel; decode it with comms")


@functools.cache
def encoder(codec: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the compiled encoder of a codec, one for all shapes (each compiles once)."""
    return jax.jit(functools.partial(encode, codec=codec))


@functools.cache
def decoder(
    codec: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Returns the compiled decoder of a codec for one type and shape."""
    return jax.jit(functools.partial(decode, codec=codec, dtype=dtype, shape=shape))


def encode_for_link(array: jax.Array, codec: str) -> Encoded:
    """Encodes on the array's device and copies the payload to the host for `Link.send`."""
    payload = np.asarray(encoder(codec)(array))
    return Encoded(codec, payload, np.dtype(array.dtype), array.shape)


def decode_from_link(payload: Payload) -> jax.Array:
    """Copies a received payload to the default device and decodes it there."""
    name = payload.codec.name
    codec = f"{name}:{payload.parameter}" if payload.parameter else name
    return decoder(codec, payload.dtype, payload.shape)(jnp.asarray(payload.data))


def _to_bytes(array: jax.Array) -> jax.Array:
    """Returns the bytes of an array, [n] uint8, in C order and little-endian."""
    flat = array.reshape(-1)
    if flat.dtype == jnp.bool_:
        return flat.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(flat, jnp.uint8).reshape(-1)


def _from_bytes(payload: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    if dtype == np.bool_:
        return payload.astype(jnp.bool_)
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(payload, dtype)
    return jax.lax.bitcast_convert_type(payload.reshape(-1, dtype.itemsize), dtype)


def _encode_blocks(array: jax.Array, codec: BlockCodec, size: int) -> jax.Array:
    flat = array.reshape(-1).astype(jnp.float32)
    count = flat.size
    block = jnp.pad(flat, (0, -count % size)).reshape(-1, size)
    top = jnp.max(jnp.abs(block), axis=1)
    usable = (top >= TINY) & (top < jnp.inf)
    # A divisor of 1 where it is not used keeps infinities out of what is computed and dropped.
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
        codes = _to_bytes(scaled.astype(codec.narrow))[:count]
    return jnp.concatenate([_to_bytes(scale), codes])


def _decode_blocks(
    payload: jax.Array,
    codec: BlockCodec,
    size: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> jax.Array:
    count = math.prod(shape)
    blocks = -(-count // size)
    scale = _from_bytes(payload[: 4 * blocks], np.dtype(np.float32))
    body = payload[4 * blocks :]
    if codec.bits == 4:
        codes = jnp.stack([body & 15, body >> 4], axis=1).reshape(-1)[:count]
        values = codes.astype(jnp.float32) - 8
    else:
        values = _from_bytes(body, codec.narrow).astype(jnp.float32)
    values = jnp.pad(values, (0, -count % size)).reshape(-1, size) * scale[:, None]
    return values.reshape(-1)[:count].astype(dtype).reshape(shape)
