"""Checks for fields that would have no effect, because what they belong to is off.

A field that is set is meant to do something, so it is refused where it cannot. Four kinds of fields
are exempt: those of ``pipeline`` and ``nodes`` that are for another method than the chosen one
(``cut`` with fl) and those of ``model`` that are for another network (``norm`` with mlp), since one
preset serves all methods and networks; those of ``tuner`` where the method is fixed, since
``pipar plan`` reads them; and those about this machine, such as folders and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipar_jax.config import Config, may_lose, schema
from pipar_jax.config.codec_candidates import RAW, SAFE
from pipar_jax.config.plugins import is_own
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.errors import ConfigError


class Requirement(NamedTuple):
    """What fields need to have an effect.

    Attributes:
      fields: Paths of the fields.
      met: Returns whether they have an effect.
      remedy: What to set, as it follows "without".
    """

    fields: tuple[str, ...]
    met: Callable[[Config], bool]
    remedy: str


def _keeps_checkpoints(config: Config) -> bool:
    return bool(config.checkpoint.every_rounds or config.checkpoint.every_s)


def _drops_devices(config: Config) -> bool:
    return may_lose(config.cohort, config.devices.total) or bool(config.cohort.script)


def _has_rule(*names: str) -> Callable[[Config], bool]:
    """Returns a check for one of some rules; a rule of the user's may use any field."""
    return lambda config: config.aggregation.rule in names or is_own(config.aggregation.rule)


_ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")
_LOSSES = "cohort.quorum, cohort.first or cohort.below (the run needs all of its devices)"
_CHECKPOINTS = "checkpoint.every_rounds or checkpoint.every_s"

#: Every field that belongs to something which another field turns on.
NEEDS: tuple[Requirement, ...] = (
    Requirement(("lora.rank", "lora.alpha"), lambda config: bool(config.lora.match), "lora.match"),
    Requirement(
        ("optimizer.nesterov",),
        lambda config: config.optimizer.name != "sgd" or config.optimizer.momentum > 0,
        "optimizer.momentum",
    ),
    Requirement(
        ("optimizer.beta2", "optimizer.epsilon"),
        lambda config: config.optimizer.name != "sgd",
        "optimizer.name=adam or adamw",
    ),
    Requirement(
        ("optimizer.drop_every", "optimizer.drop_factor"),
        lambda config: config.optimizer.schedule == "step" or is_own(config.optimizer.schedule),
        "optimizer.schedule=step",
    ),
    Requirement(
        ("aggregation.momentum",),
        _has_rule("fedavgm", *_ADAPTIVE),
        f"aggregation.rule=fedavgm or one of {', '.join(_ADAPTIVE)}",
    ),
    Requirement(
        ("aggregation.beta2",),
        _has_rule("fedadam", "fedyogi"),
        "aggregation.rule=fedadam or fedyogi",
    ),
    Requirement(
        ("aggregation.epsilon",),
        _has_rule(*_ADAPTIVE),
        f"aggregation.rule={' or '.join(_ADAPTIVE)}",
    ),
    Requirement(
        ("data.alpha",),
        lambda config: config.data.partition in ("dirichlet", "quantity"),
        "data.partition=dirichlet or quantity",
    ),
    Requirement(
        ("data.shards_per_device",),
        lambda config: config.data.partition == "labels",
        "data.partition=labels",
    ),
    Requirement(
        ("data.partition", "data.train_samples", "data.test_samples"),
        lambda config: config.data.source in PUBLIC_SOURCES,
        "a public data set (your own data are divided and counted by you)",
    ),
    Requirement(("cohort.select",), lambda config: config.cohort.size != 0, "cohort.size"),
    Requirement(("cohort.deadline_s", "cohort.optimizer_state"), _drops_devices, _LOSSES),
    Requirement(
        ("cohort.wait_s",),
        lambda config: bool(
            config.cohort.min_devices or config.devices.more or _drops_devices(config)
        ),
        "cohort.min_devices, cohort.quorum, cohort.first, cohort.below or devices.more",
    ),
    Requirement(
        ("checkpoint.keep", "checkpoint.best", "checkpoint.device_state"),
        _keeps_checkpoints,
        _CHECKPOINTS,
    ),
    Requirement(
        ("checkpoint.best", "stop.patience", "stop.target"),
        lambda config: config.run.evaluate_every > 0,
        "run.evaluate_every (only the last weights are scored)",
    ),
    Requirement(
        ("stop.metric",),
        lambda config: bool(config.stop.patience) or config.stop.target is not None,
        "stop.patience or stop.target",
    ),
    Requirement(
        ("tuner.gain", "tuner.look_s"), lambda config: config.tuner.adapt, "tuner.adapt=true"
    ),
    Requirement(
        ("tuner.activation_bits", "tuner.cotangent_bits"),
        lambda config: config.tuner.codecs not in ("", RAW, SAFE),
        "tuner.codecs=auto or a list",
    ),
)


def check_unused(config: Config, *, reads_data: bool = True) -> None:
    """Checks that every field that is set has an effect.

    Args:
      config: A configuration that fits otherwise.
      reads_data: Whether hosts read ``data.source``; a program that passes data may leave the
        fields about it as they are.

    Raises:
      ConfigError: A field has none; the message names it, its value and what it needs.
    """
    for option in schema.options(config):
        of_field = (need for need in NEEDS if option.path in need.fields)
        need = next((need for need in of_field if not need.met(config)), None)
        if need is None or (option.path.startswith("data.") and not reads_data):
            continue
        value: Any = config
        for name in option.path.split("."):
            value = getattr(value, name)
        if value != option.default:
            raise ConfigError(
                f"{option.path}={value!r} has no effect without {need.remedy}; set that, or leave "
                f"{option.path} as it is ({option.default!r})"
            )
