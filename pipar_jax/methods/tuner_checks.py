"""Checks of the fields of ``tuner``: lists of names and numbers, and when a plan may change."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipar_jax.config import Config, TunerConfig, schema
from pipar_jax.config.checks import check_codec
from pipar_jax.config.codec_candidates import AUTO, SAFE, CodecCandidates
from pipar_jax.config.texts import split_list
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, node_methods, server_methods, uses_nodes
from pipar_jax.schedule.plan import Dispatch, Order, WeightPolicy


def check_tuner(config: Config) -> None:
    """Checks the tuner's lists, and whether the run can adapt.

    Raises:
      ConfigError: A field is not valid; the message names it, its value and a remedy.
    """
    if config.tuner.times == "predicted" and config.model.dtype != "float32":
        raise ConfigError(
            f"tuner.times=predicted supports float32 only, and model.dtype={config.model.dtype}: "
            "profile the hosts (tuner.times=profiled), or compute in float32"
        )
    known = {
        "methods": server_methods(),
        "dispatch": tuple(map(str, Dispatch)),
    }
    for name in ("methods", "dispatch", "codecs", "micro_batches", "sizes"):
        field, text = f"tuner.{name}", getattr(config.tuner, name)
        parts = split_list(text)
        if not parts and name != "codecs":
            raise ConfigError(f"{field} is empty: name at least one; separate several by commas")
        for part in parts:
            if name in known and part not in known[name]:
                raise ConfigError(
                    f"{field}={text!r}: {part!r} is unknown"
                    f"{schema.did_you_mean(part, known[name])} (known: {', '.join(known[name])})"
                )
            if name == "codecs" and text not in (AUTO, SAFE):
                check_codec(part, field, config.model.dtype)
            numbers = name == "micro_batches" or (name == "sizes" and text != "auto")
            if numbers and not re.fullmatch(r"0*[1-9]\d{0,8}", part, re.ASCII):
                raise ConfigError(
                    f"{field}={text[:120]!r}: {part[:20]!r} is not a positive whole number below "
                    "10^9; write 2,4,8"
                )
    _check_tuner_numbers(config.tuner, config.data.batch_size)
    candidates = CodecCandidates(config.tuner, config.pipeline)
    if candidates.chosen:
        candidates.pairs()
    if config.tuner.adapt and not uses_nodes(config.method):
        _check_adaptation(config)


def _check_tuner_numbers(tuner: TunerConfig, batch: int) -> None:
    """Checks the tuner's lists of numbers against the size of a mini-batch."""
    own = tuner.micro_batches != TunerConfig().micro_batches
    if own and min(map(int, split_list(tuner.micro_batches))) > batch:
        raise ConfigError(
            f"tuner.micro_batches={tuner.micro_batches!r}: all exceed data.batch_size={batch}, "
            "and every micro-batch needs a sample: name smaller numbers"
        )
    if tuner.sizes != "auto" and (most := max(map(int, split_list(tuner.sizes)))) > batch:
        raise ConfigError(
            f"tuner.sizes={tuner.sizes!r}: no host computes {most} samples at a time, since "
            f"data.batch_size={batch}: name sizes up to {batch}"
        )


def _check_adaptation(config: Config) -> None:
    """Checks that a plan between devices and server may change during the run."""
    if config.pipeline.weights == WeightPolicy.SHARED:
        raise ConfigError(
            f"tuner.adapt=true cannot be combined with method={config.method} and "
            "pipeline.weights=shared: units can move only where every device has its own "
            "copy on the server, or between compute nodes; set pipeline.weights=copy, or "
            "tuner.adapt=false"
        )
    if _in_turns((config.method,)) or _in_turns(split_list(config.tuner.methods)):
        raise ConfigError(
            f"tuner.adapt=true cannot be combined with method={config.method!r} and "
            f"tuner.methods={config.tuner.methods!r}: a plan can change only where devices "
            "train in parallel, and there they take turns; choose other methods, or set "
            "tuner.adapt=false"
        )
    if config.nodes.count:
        raise ConfigError(
            f"tuner.adapt=true cannot be combined with nodes.count={config.nodes.count} and "
            f"method={config.method}, whose plans change between device and server only; use "
            f"method={' or '.join(node_methods())}, set nodes.count=0, or tuner.adapt=false"
        )


def _in_turns(methods: Iterable[str]) -> bool:
    """Returns whether devices take turns in all of some methods."""
    return all(name in METHODS and METHODS[name].order == Order.SEQUENTIAL for name in methods)
