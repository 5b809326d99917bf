"""Measures the codecs that a run may use on this host."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from comms.codecs.base import parse_codec
from pipar_jax.config.codec_candidates import CodecCandidates, configured
from pipar_jax.cost_model.profile import CodecProfile
from pipar_jax.profiling.stopwatch import least_s

#: Bytes of the array that is coded, and how often.
ARRAY_BYTES, REPEATS = 1 << 20, 5


def measure_codecs(candidates: CodecCandidates, weights: str) -> dict[str, CodecProfile]:
    """Returns ratio and speed on this host of the codecs that a run may use, apart from raw.

    They are measured on signed numbers without zeros, the worst case.

    Args:
      candidates: The codecs of activations and cotangents.
      weights: The codec of averaged weights.
    """
    rng = np.random.default_rng(0)
    array = rng.normal(size=(ARRAY_BYTES // 4,)).astype(np.float32)
    fixed = configured(candidates.pipeline)
    names = dict.fromkeys([*candidates.names(), fixed.activation, fixed.cotangent, weights])
    profiles = {}
    for name in names:
        if name == "raw":
            continue
        codec, parameter = parse_codec(name)
        payload = codec.encode(array, parameter)
        encode_s = least_s(functools.partial(codec.encode, array, parameter), REPEATS)
        decode = functools.partial(codec.decode, payload, array.dtype, array.shape, parameter)
        decode_s = least_s(decode, REPEATS)
        profiles[name] = CodecProfile(
            payload.nbytes / array.nbytes, encode_s / array.nbytes, decode_s / array.nbytes
        )
    return profiles


def weight_ratio(codec: str, profiles: Mapping[str, CodecProfile]) -> float:
    """Returns the bytes on the wire per byte of averaged weights, which ``codec`` codes."""
    return 1.0 if codec == "raw" else profiles[codec].ratio
