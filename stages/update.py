"""Optimiser updates: states by unit, and transformations over all units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from stages.trees import OptState, PyTree, Variables

Keeps: TypeAlias = Literal["", "opt_state", "all"]
_DONATED: dict[Keeps, tuple[int, ...]] = {"": (0, 1), "opt_state": (0,), "all": ()}
_Step: TypeAlias = Callable[[Variables, OptState, Variables], tuple[Variables, OptState]]


class Update:
    """The compiled optimiser step of a mini-batch; see ``make_update``."""

    def __init__(self, step: _Step, keeps: Keeps) -> None:
        """Prepares both forms of the step; they are compiled when they are first used."""

        def clearing(
            params: Variables, opt_state: OptState, accumulated: Variables
        ) -> tuple[Variables, OptState, Variables]:
            made = step(params, opt_state, accumulated)
            return *made, jax.tree.map(jnp.zeros_like, accumulated)

        donated = _DONATED[keeps]
        self._clearing = jax.jit(clearing, donate_argnums=(*donated, 2))
        self._single = jax.jit(step, donate_argnums=donated)

    def __call__(
        self, params: Variables, opt_state: OptState, accumulated: Variables
    ) -> tuple[Variables, OptState, Variables]:
        """Returns the new weights, the new optimiser state, and the accumulator, all zero."""
        result: tuple[Variables, OptState, Variables] = self._clearing(
            params, opt_state, accumulated
        )
        return result

    def single(
        self, params: Variables, opt_state: OptState, gradient: Variables
    ) -> tuple[Variables, OptState]:
        """Returns the new weights and optimiser state of a step of one micro-batch.

        The gradient is not donated, and there is no accumulator: see ``Stage.backward``.
        """
        result: tuple[Variables, OptState] = self._single(params, opt_state, gradient)
        return result

    def lower(self, params: Any, opt_state: Any, gradient: Any, *, single: bool = False) -> Any:
        """Lowers one of the forms for abstract arguments, as ``jax.stages.Lowered``."""
        chosen = self._single if single else self._clearing
        return chosen.lower(params, opt_state, gradient)


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
      update(params, opt_state, accumulated) -> (params, opt_state, zeroed accumulator); all
      three arguments are donated, but what ``keeps`` names. The state of each unit is that
      of ``optax.chain(*parts)``.
    """

    def step(
        params: Variables, opt_state: OptState, accumulated: Variables
    ) -> tuple[Variables, OptState]:
        updates: Variables = dict(accumulated)
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
