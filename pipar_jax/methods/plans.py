"""The plans of the methods: each function maps a configuration to a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipar_jax.config import Config, Hosts, aggregate_steps, places
from pipar_jax.config.codec_candidates import configured
from pipar_jax.config.schema import did_you_mean
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import (
    COORDINATOR,
    OWNER,
    Codecs,
    DevicePlan,
    Order,
    Plan,
    WeightPolicy,
    node_name,
)


def federated(config: Config, units: Sequence[str]) -> Plan:
    """FL (FedAvg, McMahan et al., arXiv 1602.05629): no cut, all devices at once, averaged."""
    del units
    devices = tuple(
        DevicePlan((), (OWNER,)) for _ in range(places(config.cohort, config.devices.total))
    )
    return _plan(config, devices, weights=WeightPolicy.COPY)


def split_learning_plan(config: Config, units: Sequence[str]) -> Plan:
    """SL (Gupta and Raskar, arXiv 1810.06060): one device after another, the part handed on."""
    devices = _two_hosts(config, units, pipelined=False)
    if len({device.cuts for device in devices}) > 1:
        raise ConfigError(
            "devices.overrides gives devices cuts of their own, but in sl they share one "
            "client-side model: use pipeline.cut alone, or another method"
        )
    return _plan(
        config,
        devices,
        order=Order.SEQUENTIAL,
        weights=WeightPolicy.SHARED,
        hand_on=config.pipeline.hand_on,
    )


def split_federated(config: Config, units: Sequence[str]) -> Plan:
    """SFL (SplitFed V1, Thapa et al., arXiv 2004.12088): SL in parallel, a server copy each."""
    return _plan(config, _two_hosts(config, units, pipelined=False))


def pipar(config: Config, units: Sequence[str]) -> Plan:
    """PiPar (Zhang et al., arXiv 2302.12803): SFL with N micro-batches in flight."""
    return _plan(config, _two_hosts(config, units, pipelined=True))


def mpsl_plan(config: Config, units: Sequence[str]) -> Plan:
    """MP-SL (Tirana et al., arXiv 2402.00208): chains of compute nodes, labels at home or not.

    Beyond the published system, micro-batches of all devices share the nodes.
    """
    return _plan(config, _chain(config, units, home=config.pipeline.labels == "home"))


def accept_plan(config: Config, units: Sequence[str]) -> Plan:
    """AccEPT's chain (Chen et al., arXiv 2311.05827): one device's data, peers as stages."""
    return _plan(config, _chain(config, units, home=False))


def cut_position(cut: int | str, units: Sequence[str], field: str = "pipeline.cut") -> int:
    """Returns a cut's position between units: a number as it is, a name's after that unit.

    Args:
      cut: A position, or the name of the last unit before the cut.
      units: Names of the model's units, in order.
      field: The configuration's field, for the message.

    Raises:
      ConfigError: It is not a position between two units of this model.
    """
    listed = ", ".join(f"{i + 1} {name}" for i, name in enumerate(units[:-1]))
    if isinstance(cut, str) and not re.fullmatch(r"\d{1,9}", cut, re.ASCII):
        if cut not in units[:-1]:
            near = did_you_mean(cut, units[:-1])
            raise ConfigError(
                f"{field}={cut[:120]!r} is not a unit to cut after{near} (cuts: {listed})"
            )
        return units.index(cut) + 1
    position = int(cut)
    if not 0 < position < len(units):
        raise ConfigError(
            f"{field}={position} is not a cut of this model of {len(units)} units: "
            f"use 1 to {len(units) - 1} (cuts: {listed})"
        )
    return position


def _two_hosts(config: Config, units: Sequence[str], *, pipelined: bool) -> tuple[DevicePlan, ...]:
    """Returns device plans of a chain of two: the device, then the server."""
    plans = []
    codecs = configured(config.pipeline)
    hosts = Hosts(config, nodes=0)
    for name in hosts.devices[: hosts.places]:  # with fewer places than devices all are alike
        device = hosts[name]
        cut = cut_position(device.cut, units, hosts.path(name, "cut"))
        micro_batches = device.micro_batches if pipelined else 1
        plans.append(DevicePlan((cut,), (OWNER, COORDINATOR), micro_batches, (codecs,)))
    return tuple(plans)


def _chain(config: Config, units: Sequence[str], *, home: bool) -> tuple[DevicePlan, ...]:
    """Returns device plans of a chain over all compute nodes, the same for every device.

    Args:
      config: A resolved configuration.
      units: Names of the model's units, in order.
      home: Whether the last stage is the device's again.
    """
    nodes = map(node_name, range(1, config.nodes.count + 1))
    hosts = (OWNER, *nodes, *((OWNER,) if home else ()))
    texts = [text.strip() for text in config.pipeline.cuts.split(",") if text.strip()]
    if len(texts) != len(hosts) - 1:
        raise ConfigError(
            f"pipeline.cuts={config.pipeline.cuts!r} has {len(texts)} cuts, but the chain "
            f"{' | '.join(hosts)} of method={config.method} with nodes.count={config.nodes.count} "
            f"needs {len(hosts) - 1}: name each, or leave it empty for the planner's"
        )
    cuts = tuple(cut_position(text, units, "pipeline.cuts") for text in texts)
    if list(cuts) != sorted(set(cuts)):
        raise ConfigError(f"pipeline.cuts={config.pipeline.cuts!r} must rise from cut to cut")
    return _alike(config, cuts, hosts)


def plan_of_chain(
    config: Config, cuts: tuple[int, ...], hosts: tuple[str, ...], codecs: tuple[Codecs, ...] = ()
) -> Plan:
    """Returns the plan in which every device has the same chain.

    Args:
      config: A resolved configuration.
      cuts: Positions between the stages.
      hosts: Host of each stage, ``device`` for the device itself.
      codecs: One pair per cut; empty: the configured one at each.
    """
    return _plan(config, _alike(config, cuts, hosts, codecs))


def _alike(
    config: Config, cuts: tuple[int, ...], hosts: tuple[str, ...], codecs: tuple[Codecs, ...] = ()
) -> tuple[DevicePlan, ...]:
    """Returns the device plans of one chain for all devices."""
    everywhere = codecs or (configured(config.pipeline),) * len(cuts)
    specs = Hosts(config, nodes=0)
    return tuple(
        DevicePlan(cuts, hosts, specs[name].micro_batches, everywhere) for name in specs.devices
    )


def _plan(config: Config, devices: tuple[DevicePlan, ...], **values: str) -> Plan:
    """Returns a plan with what all methods take from the configuration."""
    values.setdefault("weights", config.pipeline.weights)
    return Plan(
        devices=devices,
        in_flight=config.pipeline.in_flight,
        dispatch=config.pipeline.dispatch,  # type: ignore[arg-type]  # resolve() checked it
        aggregate_every=aggregate_steps(config.aggregation),
        **values,  # type: ignore[arg-type]
    )
