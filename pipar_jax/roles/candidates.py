"""The best plan that a run can change to: the tuner's choice among plans that all hosts accept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipar_jax.config import Config, TunerConfig
from pipar_jax.config.texts import split_list
from pipar_jax.cost_model.profile import Profile
from pipar_jax.errors import PlanError
from pipar_jax.methods.registry import METHODS, uses_nodes
from pipar_jax.runtime import memory, moves
from pipar_jax.schedule.plan import Order, Plan
from pipar_jax.tuner.chains import tune_chain
from pipar_jax.tuner.search import search
from stages import Model


class Candidates:
    """Finds the plan to change to.

    Args:
      config: Resolved configuration; without compute nodes, the tuner's methods but for sl.
      model: The whole model.
      samples: Samples that each device trains on in an epoch.
    """

    def __init__(self, config: Config, model: Model, samples: Sequence[int]) -> None:
        config = dataclasses.replace(config, tuner=_parallel_only(config.tuner))
        self._config, self._model, self._samples = config, model, tuple(samples)
        self._memory: dict[Plan, str | None] = {}

    def refuse(self, plan: Plan, reason: str) -> None:
        """Records a plan that a compute node refused after compiling it."""
        self._memory[plan] = reason

    def refused(self, plan: Plan) -> bool:
        """Returns whether a compute node is known to refuse a plan."""
        return self._memory.get(plan) is not None

    def best(self, profile: Profile, present: Plan) -> Plan:
        """Returns the best plan that may follow the present plan, or the present plan itself.

        Args:
          profile: The profile of hosts and links.
          present: The plan in force.
        """
        if not uses_nodes(self._config.method):
            return search(profile, self._config).plans[0].plan

        def objection(plan: Plan) -> str | None:
            reason = moves.why_not_follow(present, plan, len(self._model.units))
            return reason or self._memory_objection(plan)

        try:
            return tune_chain(profile, self._config, objection).plan
        except PlanError:  # nothing else may follow it
            return present

    def _memory_objection(self, plan: Plan) -> str | None:
        """Returns why a node would refuse a plan, or None; computed once per plan."""
        if plan not in self._memory:
            self._memory[plan] = memory.why_not_fit(self._model, plan, self._config, self._samples)
        return self._memory[plan]


def _parallel_only(tuner: TunerConfig) -> TunerConfig:
    """Returns the tuner's choices without the sequential methods."""
    names = split_list(tuner.methods)
    parallel = [name for name in names if METHODS[name].order == Order.PARALLEL]
    return dataclasses.replace(tuner, methods=",".join(parallel))
