"""Checks of ``aggregation.personal``: weights that each device keeps for itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, is_planned, plan_for
from pipar_jax.schedule.plan import OWNER, Order, Plan, long_name


def averaging_methods() -> tuple[str, ...]:
    """Returns the names of the methods that average what devices hold."""
    return tuple(
        name
        for name, method in METHODS.items()
        if method.order == Order.PARALLEL and not method.one_device
    )


def check_stays(
    config: Config,
    script: Sequence[Plan],
    units: Sequence[str],
    personal: Mapping[str, Collection[str]],
) -> None:
    """Checks that personal weights are in stages of the devices.

    Args:
      config: Resolved configuration.
      script: The plans of the rounds; empty: the method's own.
      units: Names of the model's units, in order.
      personal: For each unit that has some the paths of its personal weights.

    Raises:
      ConfigError: A plan has one of these units on another host.
    """
    if not personal:
        return
    for plan in script or (plan_for(config, units),):
        for device, one in enumerate(plan.devices):
            for stage, host in enumerate(one.hosts):
                away = [units[i] for i in plan.units(device, stage, len(units))]
                odd = next((unit for unit in away if unit in personal), None)
                if odd is not None and host != OWNER:
                    raise ConfigError(
                        f"aggregation.personal={config.aggregation.personal[:120]!r} matches "
                        f"{odd}/{min(personal[odd])}, but with the plan {plan} the unit {odd!r} of "
                        f"device {device} is on {long_name(host)}, not on the device: match "
                        "weights of the device's own stages, or move the cut"
                    )


def check_personal(config: Config) -> None:
    """Checks that weights of a device's own have a meaning.

    Args:
      config: A configuration that fits otherwise.

    Raises:
      ConfigError: A field contradicts them.
    """
    if not config.aggregation.personal:
        return
    what = f"aggregation.personal={config.aggregation.personal[:120]!r}"
    if config.method in METHODS and config.method not in averaging_methods():
        raise ConfigError(
            f"{what} keeps weights out of the average, and method={config.method} averages none "
            f"of the devices' weights: use one of {', '.join(averaging_methods())}"
        )
    if is_planned(config.method, config.pipeline) or config.tuner.adapt:
        field = "tuner.adapt=true" if config.tuner.adapt else f"method={config.method}"
        remedy = "set tuner.adapt=false" if config.tuner.adapt else (
            "set pipeline.cuts" if config.method in METHODS else "choose a method"
        )  # fmt: skip
        raise ConfigError(
            f"{what} cannot be combined with {field}, whose plans may take its weights off the "
            f"devices: {remedy}"
        )
    if config.privacy.on:
        raise ConfigError(
            f"{what} cannot be combined with privacy: the network can be scored on the devices "
            "alone then, and a private run sends no scores of the devices' own test data"
        )
    if config.run.evaluate_on != "devices":
        raise ConfigError(
            f"{what} makes a network of its own of each device, which the server cannot score: set "
            "run.evaluate_on=devices (it needs x_test and y_test of every device)"
        )
    keeps = config.checkpoint.every_rounds or config.checkpoint.every_s
    if keeps and config.checkpoint.device_state == "server":
        raise ConfigError(
            f"{what} stays on the devices, and checkpoint.device_state=server sends its optimiser "
            "states to the server: set checkpoint.device_state=device"
        )
