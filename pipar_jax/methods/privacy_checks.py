"""Checks of the fields ``privacy.*`` against each other, the method and the network."""

from __future__ import annotations

import dataclasses

from pipar_jax.aggregation.rules import MULTI_KRUM, RULES
from pipar_jax.config import Config, PrivacyConfig, aggregate_steps
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, Method
from pipar_jax.privacy.accountant import check_accountant
from pipar_jax.privacy.policy import gaussian_budget, rounds_of_users

#: Registered networks without batch normalisation, whatever ``model.norm``.
WITHOUT_STATISTICS = ("mlp", "vit_small", "decoder_small", "gpt2")


def check_privacy(config: Config, models: tuple[str, ...] = ()) -> None:
    """Checks that a private run can keep what it promises.

    Args:
      config: A configuration that fits otherwise.
      models: Names of models beyond those that ``stages`` registers.

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
    _check_delta(config)
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


def _check_delta(config: Config) -> None:
    """Checks delta against the number of records or users, where that is known."""
    delta, count, of = config.privacy.delta, config.devices.count, "users"
    if config.privacy.unit == "record":
        count, of = config.data.train_samples // count, "samples on a device"
    if delta * count >= 1:
        raise ConfigError(
            f"privacy.delta={delta:g} with {count} {of} would allow to publish one of them: set it "
            f"below {1 / count:.2g}"
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
    if aggregate_steps(config.aggregation) or config.run.rounds:
        rounds_of_users(config)
