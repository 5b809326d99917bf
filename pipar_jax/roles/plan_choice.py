"""The plan that a run begins with: as configured, or the tuner's for hosts that were surveyed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from pipar_jax.config import Config
from pipar_jax.cost_model.profile import DeviceProfile, Profile
from pipar_jax.errors import PeerError, PlanError
from pipar_jax.methods.registry import is_planned, plan_for, uses_nodes
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.survey import Surveyed, of_places, survey
from pipar_jax.runtime import memory
from pipar_jax.schedule.plan import Plan, long_name
from pipar_jax.simulator.predict import StageCosts, estimate
from pipar_jax.tuner.chains import tune_chain
from pipar_jax.tuner.codec_choice import candidates_for
from pipar_jax.tuner.search import tune
from stages import Model


def choose_plan(
    config: Config, model: Model, members: Membership, samples: Sequence[int]
) -> tuple[Plan, Surveyed | None]:
    """Returns the plan of the configured method (with method=auto the tuner's) and the survey.

    Hosts are asked for a profile only where the tuner or adaptation needs it.

    Args:
      config: Resolved configuration.
      model: The whole model.
      members: The devices, all admitted.
      samples: Samples that each trains on in an epoch.

    Raises:
      PeerError: A device was lost or failed while it was asked.
      PlanError: No plan fits into the hosts' memory.
    """
    if not is_planned(config.method, config.pipeline):
        plan = plan_for(config, model.unit_names)
        return plan, survey(config, model, members, samples) if config.tuner.adapt else None
    began_s = time.monotonic()
    surveyed = survey(config, model, members, samples)
    members.working("tuning")
    surveyed_s = time.monotonic() - began_s
    plan, surveyed = _fitting_plan(config, model, members, samples, surveyed)
    profile = surveyed.profile
    members.tell(
        {
            "event": "tuned",
            "plan": str(plan),
            "epoch_s": estimate(StageCosts(profile), plan).epoch_s,
            "survey_s": surveyed_s,
            "search_s": time.monotonic() - began_s - surveyed_s,
            "codecs": candidates_for(config, profile).words(),
            "profile": profile.to_dict(),
        }
    )
    return plan, surveyed


def _fitting_plan(
    config: Config, model: Model, members: Membership, samples: Sequence[int], surveyed: Surveyed
) -> tuple[Plan, Surveyed]:
    """Returns the tuner's plan, and the survey of those that it is for.

    A device whose memory no plan fits into, as it says, goes if the run may lose it.

    Raises:
      PeerError: No other device is left.
      PlanError: No plan fits into the hosts' memory, and that is not for such devices alone.
    """
    while True:
        try:
            return _tuned(config, model, members, samples, surveyed.profile), surveyed
        except PlanError as error:
            small = {
                name: one.host.memory_bytes
                for name, one in surveyed.devices.items()
                if one.host.memory_bytes is not None
                and members.hosts.may_be_lost(name)
                and not _has_room(config, model, members, samples, surveyed.profile, one)
            }
            if not small:
                raise
            for name, nbytes in small.items():
                members.lose(
                    name,
                    PeerError(
                        f"{long_name(name)} says that it has {nbytes / 1e6:g} MB of memory, into "
                        f"which its share of no plan fits ({error}): raise its memory_mb"
                    ),
                )
            left = {name: one for name, one in surveyed.devices.items() if name not in small}
            profile = dataclasses.replace(
                surveyed.profile, devices=of_places(left, members, samples)
            )
            surveyed = surveyed._replace(profile=profile, devices=left)


def _tuned(
    config: Config, model: Model, members: Membership, samples: Sequence[int], profile: Profile
) -> Plan:
    """Returns the tuner's plan for a profile.

    Raises:
      PlanError: No plan fits into the hosts' memory.
    """
    if not uses_nodes(config.method):
        return tune(profile, config)
    return tune_chain(
        profile,
        config,
        lambda one: memory.why_not_fit(model, one, config, samples),
        [name for name in members.hosts.nodes if name in members.by_name],
    ).plan


def _has_room(
    config: Config,
    model: Model,
    members: Membership,
    samples: Sequence[int],
    profile: Profile,
    device: DeviceProfile,
) -> bool:
    """Returns whether some plan fits if all devices are like one, and no other host has a limit."""
    free = dataclasses.replace(
        profile,
        server=dataclasses.replace(profile.server, memory_bytes=None),
        nodes=tuple(
            dataclasses.replace(node, host=dataclasses.replace(node.host, memory_bytes=None))
            for node in profile.nodes
        ),
        devices=tuple(
            dataclasses.replace(device, samples=place.samples) for place in profile.devices
        ),
    )
    try:
        _tuned(config, model, members, samples, free)
    except PlanError:
        return False
    return True
