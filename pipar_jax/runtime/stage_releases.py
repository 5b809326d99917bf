"""What of a private device's stages is clipped and noised, under a plan."""

from __future__ import annotations

import dataclasses
import math

from pipar_jax.config import PrivacyConfig
from pipar_jax.privacy import policy
from pipar_jax.schedule.plan import OWNER, DevicePlan
from stages import Model
from stages.release import PrivateRelease


def stage_releases(
    privacy: PrivacyConfig, noise: float, plan: DevicePlan, model: Model
) -> dict[int, PrivateRelease]:
    """Returns what of a device's stages is released of records, by the stage's index.

    Args:
      privacy: ``privacy.*``.
      noise: The noise multiplier of each release.
      plan: The device's part of the plan.
      model: The whole model.
    """
    own = [index for index, host in enumerate(plan.hosts) if host == OWNER]
    shapes = model.shapes(1)
    made = {}
    for index in own:
        release = PrivateRelease(
            noise,
            # Together the stages' gradients have at most the norm that is configured.
            gradient_clip=privacy.update_clip / math.sqrt(len(own)),
        )
        if index + 1 < plan.stages:
            shape = tuple(shapes[plan.cuts[index]].shape[1:])
            release = dataclasses.replace(
                release, activation_clip=privacy.activation_clip, shape=shape
            )
        elif index and policy.releases_cotangents(privacy, plan.hosts):
            shape = tuple(shapes[plan.cuts[index - 1]].shape[1:])
            release = dataclasses.replace(
                release, cotangent_clip=privacy.cotangent_clip, shape=shape
            )
        made[index] = release
    return made


def units_of_stage(plan: DevicePlan, stage: int, units: int) -> range:
    """Returns the positions of a stage's units."""
    bounds = (0, *plan.cuts, units)
    return range(bounds[stage], bounds[stage + 1])
