"""The optimiser of a replica, as optax transformations that are applied to each unit separately.

Its state is kept per unit, so that a unit can move between hosts with its momentum. FedProx is a
gradient transformation on the replica, wherever its units are. Transformations that are not
elementwise see all units of the replica at once (``stages.Joint``).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.schedules import InjectStatefulHyperparamsState

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.config.optimizers import Group, read_groups
from pipar_jax.config.plugins import is_own
from pipar_jax.errors import RunError
from pipar_jax.training import own
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


#: Steps of a run where it does not matter how many there are: for shapes of states, and durations
#: of steps. A user's schedule may refuse a few, for instance fewer than those of its warm-up.
MANY_STEPS = 1_000_000


def learning_rate(config: OptimizerConfig, steps: int) -> optax.ScalarOrSchedule:
    """Returns the learning rate, or its schedule over a run.

    A schedule's count is part of the optimiser state, so it goes on over rounds and after a resume;
    ``at_step`` sets it where a state begins anew within a run.

    Args:
      config: The optimiser's configuration.
      steps: Number of steps of a replica in the run.

    Raises:
      RunError: The user's own schedule cannot be made.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    if is_own(config.schedule):
        course = own.schedule(config, rest)
    elif config.schedule == "constant":
        if not warmup:
            return rate
        course = optax.constant_schedule(rate)
    else:
        course = _COURSES[config.schedule](config, rest)
    if not warmup:
        return course
    ramp = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([ramp, course], [warmup])


def _drops(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns a schedule that drops by a factor every so many steps."""
    del steps
    return optax.exponential_decay(
        config.learning_rate, config.drop_every, config.drop_factor, staircase=True
    )


_COURSES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "cosine": lambda config, steps: optax.cosine_decay_schedule(config.learning_rate, steps),
    "linear": lambda config, steps: optax.linear_schedule(config.learning_rate, 0.0, steps),
    "step": _drops,
}


def at_step(opt_state: OptState, step: int) -> OptState:
    """Returns an optimiser state whose learning-rate schedules are at a step of the run.

    Adam's count, by which its moments are corrected, stays: it belongs to the moments.

    Args:
      opt_state: State by unit.
      step: Steps taken.
    """

    def placed(node: PyTree) -> PyTree:
        if isinstance(node, InjectStatefulHyperparamsState):
            courses = jax.tree.map(counted, node.hyperparams_states, is_leaf=_counts)
            inner = jax.tree.map(placed, node.inner_state, is_leaf=_is_scheduled)
            node = node._replace(hyperparams_states=courses, inner_state=inner)
        return counted(node) if _is_scheduled(node) else node

    def counted(node: PyTree) -> PyTree:
        if not _counts(node):
            return node
        return node._replace(count=jnp.array(step, jnp.asarray(node.count).dtype))

    moved: OptState = jax.tree.map(placed, opt_state, is_leaf=_is_scheduled)
    return moved


def _is_scheduled(node: PyTree) -> bool:
    """Returns whether a part of an optimiser state belongs to a schedule."""
    return isinstance(node, (optax.ScaleByScheduleState, InjectStatefulHyperparamsState))


def _counts(node: PyTree) -> bool:
    """Returns whether a part of an optimiser state counts steps."""
    return "count" in getattr(node, "_fields", ())


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
    # The length of the run matters only for schedules, and to functions of the user's.
    same = config.schedule in ("constant", "step") and not is_own(config.name)
    length = 0 if same else steps
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
    rate = learning_rate(config, steps)
    if is_own(config.name):
        made += own.optimizer(config, rate, steps)
    else:
        made += _registered(config)
        made.append(optax.scale_by_learning_rate(rate))
    if config.groups:
        made.append(scale_groups(read_groups(config.groups)))
    return tuple(made)


def _registered(config: OptimizerConfig) -> Iterator[optax.GradientTransformation]:
    """Yields the parts of a registered optimiser, up to the learning rate."""
    if config.weight_decay and config.name != "adamw":
        yield optax.add_decayed_weights(config.weight_decay)
    if config.name == "sgd":
        if config.momentum:
            yield optax.trace(config.momentum, nesterov=config.nesterov)
    else:
        yield optax.scale_by_adam(
            config.momentum, config.beta2, config.epsilon, nesterov=config.nesterov
        )
        if config.weight_decay and config.name == "adamw":
            yield optax.add_decayed_weights(config.weight_decay)


def scale_groups(groups: Sequence[Group]) -> stages.Joint:
    """Returns what multiplies the updates of groups of weights, so that each has its own rate.

    Args:
      groups: The groups; a weight belongs to the first whose pattern is found in "unit/path".
    """

    def update(
        updates: Variables, state: optax.OptState, params: Variables | None = None
    ) -> tuple[Variables, optax.OptState]:
        del params
        scaled = {
            unit: {path: _factor(groups, f"{unit}/{path}") * u for path, u in arrays.items()}
            for unit, arrays in updates.items()
        }
        return scaled, state

    return stages.Joint(lambda params: optax.EmptyState(), update)


def _factor(groups: Sequence[Group], name: str) -> float:
    return next((one.factor for one in groups if re.search(one.pattern, name)), 1.0)


def check_groups(config: OptimizerConfig, names: Collection[str]) -> None:
    """Checks that every group has weights.

    Args:
      config: The optimiser's configuration.
      names: Names (unit/path) of all weights that are trained.

    Raises:
      RunError: A pattern matches none.
    """
    for group in read_groups(config.groups):
        if not any(re.search(group.pattern, name) for name in names):
            some = ", ".join(sorted(names)[:6])
            raise RunError(
                f"optimizer.groups={config.groups!r}: no trained weight matches "
                f"{group.pattern!r} (names are unit/path, such as {some})"
            )
