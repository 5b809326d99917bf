"""The codecs that a run may use for activations and cotangents."""

from __future__ import annotations

from typing import NamedTuple

from comms import parse_codec
from pipar_jax.config.texts import split_list
from pipar_jax.config.training_fields import PipelineConfig
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


class CodecCandidates(NamedTuple):
    """The codecs from which the tuner chooses, or the configured ones if it does not choose.

    Attributes:
      tuner: The candidates, and the minimum bits of each role.
      pipeline: The configured codecs.
    """

    tuner: TunerConfig
    pipeline: PipelineConfig

    @property
    def chosen(self) -> bool:
        """Whether the tuner chooses codecs."""
        return bool(self.tuner.codecs)

    @property
    def by_bits(self) -> bool:
        """Whether the tuner chooses between raw and ``bits:K``, and the number of bits."""
        return self.tuner.codecs == AUTO

    def names(self) -> list[str]:
        """Returns all codecs that the tuner may choose."""
        if self.by_bits:
            widths = (name for role in ROLES for name in bit_widths(self.tuner, role))
            return list(dict.fromkeys(widths))
        return list(split_list(self.tuner.codecs))

    def allowed(self, role: str) -> list[str]:
        """Returns the codecs to search for a role: the candidates, or the configured codec.

        Raises:
          ConfigError: No candidate has the minimum number of bits of the role.
        """
        if not self.chosen:
            return [getattr(self.pipeline, f"{role}_codec")]
        if self.by_bits:
            return [RAW, bit_widths(self.tuner, role)[0]]
        floor, listed = getattr(self.tuner, f"{role}_bits"), split_list(self.tuner.codecs)
        able = [name for name in listed if (_bits(name) or floor) >= floor]
        if not able:
            kept = ", ".join(f"{name}: {_bits(name)}" for name in listed)
            raise ConfigError(
                f"tuner.codecs={self.tuner.codecs!r} has no codec for {role}s, which need at least "
                f"{floor} bits ({kept}): allow raw, or lower --config.tuner.{role}_bits"
            )
        return able

    def pairs(self) -> list[Codecs]:
        """Returns the pairs of codecs to search.

        Raises:
          ConfigError: No candidate has the minimum number of bits of a role.
        """
        activations, cotangents = map(self.allowed, ROLES)
        return [Codecs(a, c) for a in activations for c in cotangents]


def configured(pipeline: PipelineConfig) -> Codecs:
    """Returns the configured codecs of activations and cotangents."""
    return Codecs(pipeline.activation_codec, pipeline.cotangent_codec)


def _bits(name: str) -> int | None:
    codec, parameter = parse_codec(name)
    return codec.precision_bits(parameter)
