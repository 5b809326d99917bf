"""Inputs and baselines of the codec benchmark: tensors of real training, general compressors.

Tensors are the activations and cotangents at chosen cuts of a network after a few steps of
training, since those of initial weights have a different distribution.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import stages
from comms import parse_codec
from comms.arrays import Array

LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Coder(NamedTuple):
    """A compressor of arrays.

    Attributes:
      encode: Converts an array to bytes.
      decode: Converts them back, given dtype and shape.
      lossy: Whether it is lossy.
    """

    encode: Callable[[Array], Any]
    decode: Callable[[Any, Array], Array]
    lossy: bool


def coders(names: Sequence[str], missing: Callable[[str], None]) -> dict[str, Coder]:
    """Returns our codecs by name, and the installed general compressors.

    Args:
      names: Names of our codecs.
      missing: Called with a sentence about each compressor that is not installed.
    """
    found = {name: _ours(name) for name in names}
    if _installed("zstandard", missing):
        import zstandard

        pack, unpack = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        found["zstandard, level 3"] = Coder(
            lambda array: pack.compress(array.data),
            lambda data, like: _from(unpack.decompress(data), like),
            lossy=False,
        )
    if _installed("blosc2", missing):
        import blosc2

        pack2 = functools.partial(
            blosc2.compress2, typesize=4, codec=blosc2.Codec.LZ4, nthreads=1,
            filters=[blosc2.Filter.BITSHUFFLE],
        )  # fmt: skip
        found["blosc2, LZ4 and bit shuffle"] = Coder(
            pack2,
            lambda data, like: _from(blosc2.decompress2(data, nthreads=1), like),
            lossy=False,
        )
    return found


def nbytes(encoded: Any) -> int:
    """Returns the size of encoded data."""
    return encoded.nbytes if isinstance(encoded, np.ndarray) else len(encoded)


def tensors_of(
    network: str, images: Array, labels: Array, cuts: tuple[int, ...], batch: int
) -> Mapping[str, Array]:
    """Trains a network and returns the tensors at its cuts in the last step.

    Args:
      network: One of ``stages.MODELS``.
      images: [n, height, width, channels] float32, normalised; as many steps as it has batches.
      labels: [n] integers.
      cuts: Cuts of the network, increasing.
      batch: Samples per step.

    Returns:
      [batch, …] float32 by "cut C activation" and "cut C cotangent".
    """
    model = stages.build(network, input_shape=images.shape[1:], classes=10)
    parts = stages.split(model, cuts)
    params, state = model.init(0)
    tx, draw = optax.sgd(LEARNING_RATE, MOMENTUM), stages.make_draw(batch)
    update = stages.make_update(tx)
    held = [stages.select(part, params) for part in parts]
    stats = [stages.select(part, state) for part in parts]
    opts = [stages.init_opt_state(own, tx) for own in held]
    gradients: list[Any] = [None] * len(parts)
    found: dict[str, Array] = {}
    for at in range(0, len(images) - batch + 1, batch):
        h = jax.device_put(images[at : at + batch])
        kept = []
        for i, cut in enumerate(cuts):
            h, residuals, stats[i] = parts[i].forward(held[i], stats[i], h, draw)
            kept.append(residuals)
            found[f"cut {cut} activation"] = np.array(h)
        _, cotangent, gradients[-1], stats[-1] = parts[-1].loss(
            held[-1], stats[-1], h, jax.device_put(labels[at : at + batch]), draw, None
        )
        for i in reversed(range(len(cuts))):
            found[f"cut {cuts[i]} cotangent"] = np.array(cotangent)
            assert cotangent is not None  # only the first stage has no cotangent
            cotangent, gradients[i] = parts[i].backward(held[i], kept.pop(), cotangent, None)
        for i in range(len(parts)):
            held[i], opts[i] = update(held[i], opts[i], gradients[i])
    return found


def _installed(package: str, missing: Callable[[str], None]) -> bool:
    """Returns whether a package is there, and tells where it is not."""
    if importlib.util.find_spec(package) is not None:
        return True
    missing(f"No figures of {package}: it is not installed (extra `peers`).")
    return False


def _ours(name: str) -> Coder:
    codec, parameter = parse_codec(name)
    return Coder(
        lambda array: codec.encode(array, parameter),
        lambda data, like: codec.decode(data, like.dtype, like.shape, parameter),
        lossy=name not in ("raw", "bits:lossless"),
    )


def _from(data: bytes, like: Array) -> Array:
    return np.frombuffer(data, like.dtype).reshape(like.shape)
