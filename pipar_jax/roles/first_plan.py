"""The plan that a run begins with, and what changes it between rounds."""

from __future__ import annotations

from collections.abc import Sequence

from pipar_jax.config import Config
from pipar_jax.config.membership_script import Attempt
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import is_planned
from pipar_jax.roles.adaptation import Adaptation
from pipar_jax.roles.course import odd_plan
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.plan_choice import choose_plan
from pipar_jax.roles.scripted_plans import ScriptedPlans
from pipar_jax.roles.survey import Surveyed
from pipar_jax.runtime.host import Host
from pipar_jax.schedule.plan import Plan
from stages import Model


def first_plan(
    config: Config,
    model: Model,
    members: Membership,
    script: Sequence[Plan],
    samples: Sequence[int],
    kept: Plan | None,
    replayed: Attempt | None,
) -> tuple[Plan, Surveyed | None]:
    """Returns the plan to begin with, and what hosts and links showed if they were asked.

    Args:
      config: Resolved configuration.
      model: The whole model.
      members: The devices and compute nodes, admitted.
      script: Plans of the rounds, from the first on; empty: as configured.
      samples: Samples of an epoch by place.
      kept: The plan of a run that is resumed.
      replayed: The first attempt of a run that is replayed.

    Raises:
      RunError: The plan of the replayed run is not one of this run's hosts and units.
    """
    if script:
        return kept or script[0], None
    if kept is not None and not config.tuner.adapt:
        return kept, None
    if (planned := _replayed_plan(config, model, members, replayed)) is not None:
        return planned, None
    # Adapting starts from a survey, in a resumed run too.
    chosen, surveyed = choose_plan(config, model, members, samples)
    return kept or chosen, surveyed


def _replayed_plan(
    config: Config, model: Model, members: Membership, first: Attempt | None
) -> Plan | None:
    """Returns the plan that was searched for in a run that is replayed, or None."""
    planned = is_planned(config.method, config.pipeline)
    if first is None or first.nodes.plan is None or not planned:
        return None
    plan = first.nodes.plan
    if (odd := odd_plan(plan, members.hosts, len(model.units))) is not None:
        raise RunError(f"cohort.script={config.cohort.script!r} has a plan {odd}")
    return plan


def make_adaptation(
    config: Config,
    model: Model,
    host: Host,
    members: Membership,
    script: Sequence[Plan],
    plan: Plan,
    rounds: int,
    surveyed: Surveyed | None,
) -> Adaptation | ScriptedPlans | None:
    """Returns what changes the plan between rounds; usually nothing.

    Args:
      config: Resolved configuration.
      model: The whole model.
      host: The host in this process.
      members: The devices and compute nodes.
      script: Plans of the rounds, from the first on; empty: as configured.
      plan: The plan to begin with.
      rounds: Number of rounds of the run.
      surveyed: What hosts and links showed.
    """
    if script:
        return ScriptedPlans(script, members, host, len(model.units))
    if not config.tuner.adapt or surveyed is None:
        return None
    return Adaptation(config, model, surveyed, plan, rounds, members, host)
