"""The candidate codecs of a configuration."""

from __future__ import annotations

from comms import parse_codec
from pipar_jax.config.fields import Config
from pipar_jax.config.texts import split_list
from pipar_jax.config.tuner_fields import TunerConfig
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import Codecs

AUTO, RAW = "auto", "raw"
#: The candidates for K.
BITS = (1, 2, 3, 4, 5, 6, 7, 9, 11, 15, 23)
ROLES = ("activation", "cotangent")


def bit_widths(config: TunerConfig, role: str) -> tuple[str, ...]:
    """Returns the candidates of ``auto`` for a role, from the fewest bits allowed up to raw."""
    floor = getattr(config, f"{role}_bits")
    return (*(f"bits:{bits}" for bits in BITS if bits + 1 >= floor), RAW)


def names(config: TunerConfig) -> list[str]:
    """Returns all codecs that the tuner may choose."""
    if config.codecs == AUTO:
        return list(dict.fromkeys(name for role in ROLES for name in bit_widths(config, role)))
    return list(split_list(config.codecs))


def allowed(config: Config, role: str) -> list[str]:
    """Returns the codecs to search for a role: the candidates, or the configured codec.

    Raises:
      ConfigError: No candidate has the minimum number of bits of the role.
    """
    if not config.tuner.codecs:
        return [getattr(config.pipeline, f"{role}_codec")]
    if config.tuner.codecs == AUTO:
        return [RAW, bit_widths(config.tuner, role)[0]]
    floor, listed = getattr(config.tuner, f"{role}_bits"), split_list(config.tuner.codecs)
    found = [name for name in listed if (_bits(name) or floor) >= floor]
    if not found:
        kept = ", ".join(f"{name}: {_bits(name)}" for name in listed)
        raise ConfigError(
            f"tuner.codecs={config.tuner.codecs!r} has no codec for {role}s, which need at least "
            f"{floor} bits ({kept}): allow raw, or lower --config.tuner.{role}_bits"
        )
    return found


def pairs(config: Config) -> list[Codecs]:
    """Returns the pairs of codecs to search.

    Raises:
      ConfigError: No candidate has the minimum number of bits of a role.
    """
    activations, cotangents = (allowed(config, role) for role in ROLES)
    return [Codecs(a, c) for a in activations for c in cotangents]


def _bits(name: str) -> int | None:
    codec, parameter = parse_codec(name)
    return codec.precision_bits(parameter)
