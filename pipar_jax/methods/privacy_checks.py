"""Checks of the fields ``privacy.*`` against each other, the method and the network."""

from __future__ import annotations

import dataclasses

from pipar_jax.aggregation.rules import MULTI_KRUM, RULES
from pipar_jax.config import Config, PrivacyConfig
from pipar_jax.data.published import PUBLIC_SOURCES, training_samples
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, Method
from pipar_jax.privacy.accountant import check_accountant
from pipar_jax.privacy.policy import gaussian_budget, guarantee, rounds_of_users

#: The square of a smaller clip, divided by a mini-batch, has no room in float32.
LEAST_CLIP = 1e-9
#: Registered networks without batch normalisation, whatever ``model.norm``.
WITHOUT_STATISTICS = ("mlp", "vit_small", "decoder_small", "gpt2")


def check_privacy(config: Config, models: tuple[str, ...] = (), *, reads_data: bool = True) -> None:
    """Checks that a private run can keep what it promises.

    Args:
      config: A configuration that fits otherwise.
      models: Names of models beyond those that ``stages`` registers.
      reads_data: Whether hosts read ``data.source``, and are not passed their data by a program.

    Raises:
      ConfigError: A field is not valid, has no effect, or contradicts another.
    """
    privacy = config.privacy
    if privacy.on and config.run.evaluate_on != "server":
        raise ConfigError(
            f"run.evaluate_on={config.run.evaluate_on!r} sends scores of the devices' own test "
            "data, which a private run does not: set run.evaluate_on=server"
        )
    if not privacy.on:
        _check_off(privacy)
        return
    if config.method not in METHODS:
        raise ConfigError(
            f"privacy cannot be combined with method={config.method}, which chooses what leaves "
            f"the devices only later: choose one of {', '.join(METHODS)}"
        )
    method = METHODS[config.method]
    if config.tuner.adapt:
        raise ConfigError(
            "tuner.adapt=true cannot be combined with privacy: another plan releases other values, "
            "and noise is calibrated before the run; set tuner.adapt=false"
        )
    check_accountant(privacy.accountant)
    _check_labels(config, method)
    _check_clips(privacy, method, home=method.keeps_labels(config.pipeline))
    _check_delta(config, reads_data=reads_data)
    _check_adaptive_clip(privacy)
    if privacy.unit == "user":
        _check_users(config, method)
    elif privacy.noise_at != "device":
        raise ConfigError(
            "privacy.noise_at=server is for privacy.unit=user: records are protected before "
            "anything leaves the device; set noise_at=device"
        )
    if privacy.epsilon is not None:
        gaussian_budget(privacy)
    name = config.model.name
    own = name in models or name.startswith("module:")
    if config.model.norm == "batch" and not own and name not in WITHOUT_STATISTICS:
        raise ConfigError(
            f"model.norm=batch couples the samples of a mini-batch on the device, so that clipping "
            f"each is not enough for privacy: set model.norm=group (model.name={name})"
        )


def _check_off(privacy: PrivacyConfig) -> None:
    default = PrivacyConfig()
    for field in (f.name for f in dataclasses.fields(default)):
        if getattr(privacy, field) != getattr(default, field):
            raise ConfigError(
                f"privacy.{field}={getattr(privacy, field)!r} has no effect: set privacy.epsilon "
                "(a budget, to which noise is calibrated) or privacy.noise as well"
            )


def _check_labels(config: Config, method: Method) -> None:
    """Checks how labels are protected against whether they travel."""
    privacy = config.privacy
    if (privacy.labels == "randomised") != (privacy.label_epsilon is not None):
        raise ConfigError(
            "privacy.labels=randomised and privacy.label_epsilon belong together: give both, or "
            "neither"
        )
    if privacy.labels == "randomised" and not method.cuts:
        raise ConfigError(
            f"privacy.labels=randomised has no effect with method={method.name}, where labels stay "
            "on the device: set labels=home"
        )
    if privacy.labels == "home" and method.cuts and not method.keeps_labels(config.pipeline):
        raise ConfigError(
            f"privacy.labels=home, but labels travel with method={method.name}: use method=mpsl "
            "with pipeline.labels=home, or labels=randomised"
        )


def _check_clips(privacy: PrivacyConfig, method: Method, *, home: bool) -> None:
    """Checks that all that leaves a device is clipped, and nothing else."""
    protected = home and privacy.labels == "home"
    wanted = {
        "update_clip": (True, "the weights that leave the devices are protected by it"),
        "activation_clip": (
            method.cuts,
            f"activations leave the devices with method={method.name}"
            if method.cuts
            else f"no activation leaves the devices with method={method.name}",
        ),
        "cotangent_clip": (
            protected,
            "cotangents leave the device's last stage, which depend on its labels"
            if protected
            else "it is for labels=home under a cut",
        ),
    }
    for field, (needed, why) in wanted.items():
        clip = getattr(privacy, field)
        if bool(clip) != needed:
            remedy = f"set --config.privacy.{field}" if needed else "leave it 0"
            raise ConfigError(f"privacy.{field}={clip:g}, but {why}: {remedy}")
        if 0 < clip < LEAST_CLIP:
            raise ConfigError(
                f"privacy.{field}={clip:g} is too small for norms to be computed beside it: set it "
                f"to {LEAST_CLIP:g} or more"
            )


def _check_adaptive_clip(privacy: PrivacyConfig) -> None:
    """Checks the fields of a clip that adapts."""
    if privacy.clip_quantile is not None:
        if privacy.unit != "user":
            raise ConfigError(
                f"privacy.clip_quantile={privacy.clip_quantile:g} is for privacy.unit=user: a "
                "count for each mini-batch of records costs more than it is worth; leave it unset"
            )
        return
    default = PrivacyConfig()
    for field in ("clip_rate", "count_noise"):
        if (value := getattr(privacy, field)) != getattr(default, field):
            raise ConfigError(
                f"privacy.{field}={value:g} has no effect without privacy.clip_quantile: set both"
            )


def _check_delta(config: Config, *, reads_data: bool) -> None:
    """Checks delta against the number of records or users, where that is known."""
    privacy, data, count = config.privacy, config.data, config.devices.count
    if privacy.unit == "user":
        check_delta(privacy, count, "users")
    elif reads_data and data.source in PUBLIC_SOURCES:  # some device has its share of them at least
        samples = training_samples(data.source, data.train_samples) // count
        check_delta(privacy, samples, "samples on a device")


def check_delta(privacy: PrivacyConfig, count: int, of: str) -> None:
    """Checks that delta does not allow to publish a record, or a whole user.

    Args:
      privacy: ``privacy.*``.
      count: How many records or users there are.
      of: What is counted, in words.

    Raises:
      ConfigError: It does.
    """
    if privacy.delta * count >= 1:
        raise ConfigError(
            f"privacy.delta={privacy.delta:g} with {count} {of} would allow to publish one of "
            f"them: set it below {1 / count:.2g}"
        )


def _check_users(config: Config, method: Method) -> None:
    """Checks what the protection of whole users needs."""
    if method.cuts:
        raise ConfigError(
            f"privacy.unit=user cannot be combined with method={method.name}, which sends an "
            "activation for each record: use method=fl, or unit=record"
        )
    if config.aggregation.weighted:
        raise ConfigError(
            "privacy.unit=user averages with public weights, and the number of a user's samples is "
            "not public: set aggregation.weighted=false"
        )
    if config.privacy.noise_at == "server" and config.aggregation.rule not in RULES:
        raise ConfigError(
            f"privacy.noise_at=server adds noise to a sum of updates, and aggregation.rule="
            f"{config.aggregation.rule} does not average: use one of {', '.join(RULES)}, or "
            "noise_at=device"
        )
    if config.aggregation.update_bound or config.aggregation.rule == MULTI_KRUM:
        raise ConfigError(
            "privacy.unit=user cannot be combined with aggregation.update_bound or "
            "aggregation.rule=multi_krum: updates are bounded by privacy.update_clip, and the "
            "divisor of their sum has to be planned"
        )
    keeps = config.checkpoint.every_rounds or config.checkpoint.every_s
    if keeps and config.checkpoint.device_state == "server":
        raise ConfigError(
            "privacy.unit=user cannot be combined with checkpoint.device_state=server: optimiser "
            "states are functions of a user's data; set device_state=device"
        )
    rounds = rounds_of_users(config)
    if config.privacy.clip_quantile is not None:
        guarantee(config.privacy, (), rounds)  # a count may cost more than is left
