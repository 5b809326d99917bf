"""Optimiser updates: states by unit, and transformations over all units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import optax

from stages.trees import OptState, PyTree, Variables

Keeps: TypeAlias = Literal["", "opt_state", "all"]
_DONATED: dict[Keeps, tuple[int, ...]] = {"": (0, 1), "opt_state": (0,), "all": ()}
_Step: TypeAlias = Callable[[Variables, OptState, Variables], tuple[Variables, OptState]]


class Update:
    """The compiled optimiser step of a mini-batch; see ``make_update``."""

    def __init__(self, step: _Step, keeps: Keeps) -> None:
        """Prepares the step, which is compiled when it is first used."""
        self._step = jax.jit(step, donate_argnums=_DONATED[keeps])

    def __call__(
        self, params: Variables, opt_state: OptState, gradient: Variables
    ) -> tuple[Variables, OptState]:
        """Returns the new weights and the new optimiser state.

        The gradient is not donated: its arrays may be the next step's accumulator.
        """
        result: tuple[Variables, OptState] = self._step(params, opt_state, gradient)
        return result

    def lower(self, params: Any, opt_state: Any, gradient: Any) -> Any:
        """Lowers the step for abstract arguments, as ``jax.stages.Lowered``."""
        return self._step.lower(params, opt_state, gradient)


class Joint(optax.GradientTransformation):  # type: ignore[misc]  # optax is untyped
    """A transformation that looks at the gradients of all units at once, such as a global norm.

    It has no state (``optax.EmptyState``), since a unit moves between hosts only with its own
    state.
    """

    __slots__ = ()


def init_opt_state(params: Variables, *parts: optax.GradientTransformation) -> OptState:
    """Returns {unit: optimiser state of the unit}, so that a unit can move with its own.

    Args:
      params: Weights by unit.
      *parts: As for ``make_update``.
    """
    init = jax.jit(optax.chain(*parts).init)
    return {unit: init(arrays) for unit, arrays in params.items()}


def make_update(*parts: optax.GradientTransformation, keeps: Keeps = "") -> Update:
    """Returns the compiled optimiser step of a mini-batch.

    Args:
      *parts: Optax transformations, applied one after another as ``optax.chain`` does. Each is
        applied to each unit separately and must not depend on other units, except a ``Joint`` one,
        which is applied to all units at once.
      keeps: What stays usable as it was before the step: the state, or the weights as well.

    Returns:
      update(params, opt_state, gradient) -> (params, opt_state), which are donated, but what
      ``keeps`` names. The state of each unit is that of ``optax.chain(*parts)``.
    """

    def step(
        params: Variables, opt_state: OptState, gradient: Variables
    ) -> tuple[Variables, OptState]:
        updates: Variables = dict(gradient)
        states: dict[str, list[PyTree]] = {unit: list(opt_state[unit]) for unit in params}
        for i, part in enumerate(parts):
            if isinstance(part, Joint):
                updates, _ = part.update(updates, optax.EmptyState(), params)
                continue
            for unit, arrays in params.items():
                updates[unit], states[unit][i] = part.update(updates[unit], states[unit][i], arrays)
        new_params = {
            unit: dict(optax.apply_updates(arrays, updates[unit]))
            for unit, arrays in params.items()
        }
        new_state = {unit: tuple(some) for unit, some in states.items()}
        return new_params, new_state

    return Update(step, keeps)
