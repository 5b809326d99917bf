"""The optimiser of a replica, as optax transformations that are applied to each unit separately.

Its state is kept per unit, so that a unit can move between hosts with its momentum. FedProx is a
gradient transformation on the replica, wherever its units are. Transformations that are not
elementwise see all units of the replica at once (``stages.Joint``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import stages
from pipar_jax.config import OptimizerConfig
from stages.trees import OptState, PyTree, Variables


class ProximalState(NamedTuple):
    """The weights at the start of a round, towards which FedProx pulls."""

    anchor: optax.Params


def add_proximal(mu: float) -> optax.GradientTransformation:
    """Returns FedProx's term: g + mu (w - w_round).

    The gradient of (mu / 2) |w - w_round|², of Li et al., Federated Optimization in Heterogeneous
    Networks, arXiv 1812.06127, equation 2. ``anchor`` renews w_round after each aggregation.

    Args:
      mu: Weight of the proximal term.
    """

    def init(params: optax.Params) -> ProximalState:
        # A copy: params and optimiser state are both donated by the update.
        return ProximalState(jax.tree.map(jnp.copy, params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, ProximalState)
        pulled = jax.tree.map(lambda g, w, a: g + mu * (w - a), updates, params, state.anchor)
        return pulled, state

    return optax.GradientTransformation(init, update)


def anchor(opt_state: OptState, params: Variables) -> dict[str, PyTree]:
    """Returns the optimiser state with FedProx's anchor set to the weights of a new round.

    Args:
      opt_state: State by unit; unchanged without an anchor.
      params: Weights by unit.
    """

    def renew(node: PyTree, weights: PyTree) -> PyTree:
        if isinstance(node, ProximalState):
            return ProximalState(jax.tree.map(jnp.copy, weights))
        if isinstance(node, tuple) and not hasattr(node, "_fields"):
            return tuple(renew(one, weights) for one in node)
        return node

    return {unit: renew(state, params[unit]) for unit, state in opt_state.items()}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.ScalarOrSchedule:
    """Returns the learning rate, or its schedule over a run.

    Args:
      config: The optimiser's configuration.
      steps: Number of steps of a replica in the run.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    if config.decay == "cosine":
        course: optax.Schedule = optax.cosine_decay_schedule(rate, rest)
    elif config.decay == "linear":
        course = optax.linear_schedule(rate, 0.0, rest)
    elif warmup:
        course = optax.constant_schedule(rate)
    else:
        return rate
    if not warmup:
        return course
    ramp = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([ramp, course], [warmup])


class CompiledOptimizer(NamedTuple):
    """A transformation with the compiled step of a replica.

    Attributes:
      transformation: Result of ``build``, whose ``init`` creates the state of a unit.
      update: Result of ``stages.make_update`` for its parts.
      keeping_state: The same step, which leaves the state from before it as it is.
      keeping_all: The same step, which leaves the weights from before it as well.
    """

    transformation: optax.GradientTransformation
    update: stages.Update
    keeping_state: stages.Update
    keeping_all: stages.Update


def compiled(config: OptimizerConfig, *, steps: int, proximal_mu: float = 0.0) -> CompiledOptimizer:
    """Returns the transformation of a replica and its compiled step; see ``build``.

    Hosts of one process with the same optimiser share it, so that it is compiled once.
    """
    # The length of the run matters only for schedules.
    length = steps if config.decay != "constant" else 0
    return _compiled(dataclasses.astuple(config), length, proximal_mu)


@functools.lru_cache(maxsize=32)
def _compiled(fields: tuple[Any, ...], steps: int, proximal_mu: float) -> CompiledOptimizer:
    made = parts(OptimizerConfig(*fields), steps=steps, proximal_mu=proximal_mu)
    return CompiledOptimizer(
        optax.chain(*made),
        stages.make_update(*made),
        stages.make_update(*made, keeps="opt_state"),
        stages.make_update(*made, keeps="all"),
    )


def build(
    config: OptimizerConfig, *, steps: int, proximal_mu: float = 0.0
) -> optax.GradientTransformation:
    """Returns the transformation of a replica; see ``parts``."""
    return optax.chain(*parts(config, steps=steps, proximal_mu=proximal_mu))


def parts(
    config: OptimizerConfig, *, steps: int, proximal_mu: float = 0.0
) -> tuple[optax.GradientTransformation, ...]:
    """Returns the parts of a replica's transformation, to be chained.

    Clipping depends on the gradient of one replica, that is one stage of one device, and Adam's
    moments on one device: neither equals centralised training once weights are averaged. Without a
    cut a replica is the whole model.

    Args:
      config: The optimiser's configuration.
      steps: Number of steps of a replica in the run, for the learning-rate schedule.
      proximal_mu: Weight of FedProx's proximal term; 0 for none.
    """
    made: list[optax.GradientTransformation] = []
    if proximal_mu:
        made.append(add_proximal(proximal_mu))
    if config.clip_norm is not None:
        made.append(stages.Joint(*optax.clip_by_global_norm(config.clip_norm)))
    if config.weight_decay and config.name != "adamw":
        made.append(optax.add_decayed_weights(config.weight_decay))
    if config.name == "sgd":
        if config.momentum:
            made.append(optax.trace(config.momentum, nesterov=config.nesterov))
    else:
        made.append(
            optax.scale_by_adam(
                config.momentum, config.beta2, config.epsilon, nesterov=config.nesterov
            )
        )
        if config.weight_decay and config.name == "adamw":
            made.append(optax.add_decayed_weights(config.weight_decay))
    made.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    return tuple(made)
