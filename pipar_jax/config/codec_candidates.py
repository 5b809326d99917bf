"""The codecs that a run may use for activations and cotangents."""

from __future__ import annotations

from typing import NamedTuple

from comms import parse_codec
from pipar_jax.config.fields import AUTO as AUTO_METHOD
from pipar_jax.config.fields import Config
from pipar_jax.config.texts import split_list
from pipar_jax.config.training_fields import PipelineConfig
from pipar_jax.config.tuner_fields import TunerConfig
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import Codecs
from stages.names import MODELS, TOKEN_MODELS

AUTO, SAFE, RAW = "auto", "safe", "raw"
#: The candidates for K.
BITS = (1, 2, 3, 4, 5, 6, 7, 9, 11, 15, 23)
ROLES = ("activation", "cotangent")
#: Minimum bits of both roles with ``safe``, sign included: with as many, trials lost no accuracy
#: that could be told from chance; with 4 bits of activations they may have (docs/codecs.md).
SAFE_BITS = 8
#: The network of these trials, and the trials in words.
MEASURED, TRIALS = "vgg5", "three paired seeds of VGG-5 on 4,000 images of CIFAR-10, five epochs"
#: Networks like it: convolutions over images, classified in the end.
CONVOLUTIONAL = tuple(name for name in MODELS if name not in ("mlp", "vit_small", *TOKEN_MODELS))


def bit_widths(config: TunerConfig, role: str) -> tuple[str, ...]:
    """Returns the candidates by bits for a role, from the fewest bits allowed up to raw."""
    floor = SAFE_BITS if config.codecs == SAFE else getattr(config, f"{role}_bits")
    return (*(f"bits:{bits}" for bits in BITS if bits + 1 >= floor), RAW)


class CodecCandidates(NamedTuple):
    """The codecs from which the tuner chooses, or the configured ones if it does not choose.

    Attributes:
      tuner: The candidates, and the minimum bits of each role.
      pipeline: The configured codecs.
      network: Name of the network.
      objection: Why codecs are not chosen with ``tuner.codecs=safe``; empty if they are.
    """

    tuner: TunerConfig
    pipeline: PipelineConfig
    network: str = MEASURED
    objection: str = ""

    @property
    def safe(self) -> bool:
        """Whether only codecs may be chosen that lost no accuracy in trials."""
        return self.tuner.codecs == SAFE

    @property
    def chosen(self) -> bool:
        """Whether the tuner chooses codecs."""
        return bool(self.tuner.codecs) and not (self.safe and self.objection)

    @property
    def by_bits(self) -> bool:
        """Whether the tuner chooses between raw and ``bits:K``, and the number of bits."""
        return self.tuner.codecs in (AUTO, SAFE)

    def names(self) -> list[str]:
        """Returns all codecs that the tuner may choose."""
        if not self.chosen:
            return []
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

    def words(self) -> str:
        """Returns why codecs are looked at or not; empty if the configuration says which."""
        if not self.safe:
            return ""
        if self.objection:
            return (
                f"codecs are those of pipeline, since {self.objection}; "
                "--config.tuner.codecs=auto looks at others all the same"
            )
        other = "" if self.network == MEASURED else f", not measured with {self.network}"
        return (
            f"{bit_widths(self.tuner, ROLES[0])[0]} or finer on slow links: no loss of accuracy "
            f"beyond chance in {TRIALS}{other}; --config.tuner.codecs=raw for none"
        )


def candidates_of(config: Config, network: str) -> CodecCandidates:
    """Returns the codecs from which the tuner chooses in a run.

    Args:
      config: The configuration.
      network: Name of the network.
    """
    objection = _objection(config, network) if config.tuner.codecs == SAFE else ""
    return CodecCandidates(config.tuner, config.pipeline, network, objection)


def configured(pipeline: PipelineConfig) -> Codecs:
    """Returns the configured codecs of activations and cotangents."""
    return Codecs(pipeline.activation_codec, pipeline.cotangent_codec)


def _objection(config: Config, network: str) -> str:
    """Returns why ``safe`` chooses no codecs; empty if it does."""
    set_to = configured(config.pipeline)
    if config.method != AUTO_METHOD:
        return f"method={config.method} and not auto"
    if config.tuner.select == "paper":
        return "the paper's formulas have no codecs"
    if set_to != Codecs(RAW, RAW):
        return f"they are set to {set_to.activation} and {set_to.cotangent}"
    if config.model.dtype != "float32":
        return f"accuracy was not measured with model.dtype={config.model.dtype}"
    if config.task.name != "classification" or network not in CONVOLUTIONAL:
        return "accuracy was measured with convolutional networks that classify images only"
    if config.model.trainable or config.lora.match:
        return "accuracy was not measured where only some weights are trained"
    return ""


def _bits(name: str) -> int | None:
    codec, parameter = parse_codec(name)
    return codec.precision_bits(parameter)
