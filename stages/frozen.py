"""Weights that are not trained: drawn where they are needed, once in a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from stages.trees import Arrays, PyTree, Variables
from stages.unit import Unit

#: From a unit to weights of it by path, which take the place of those drawn from the seed.
Base: TypeAlias = Callable[[Unit], Mapping[str, PyTree]]


class Frozen:
    """Frozen weights of a model, of those units that a process asks for.

    Every host draws them itself, from the same seed, the user's own function or a file of its own,
    and all replicas of a unit use one copy. So they never cross a link.

    Attributes:
      seed: Root seed.
      base: Where weights come from that are not drawn from the seed; None: all are drawn.
    """

    def __init__(self, units: Sequence[Unit], seed: int, base: Base | None = None) -> None:
        """Draws nothing yet.

        Args:
          units: The model's units.
          seed: Root seed.
          base: Where weights come from that are not drawn from the seed; None: all are drawn.
        """
        self._units = {unit.name: unit for unit in units}
        self.seed, self.base = seed, base
        self._held: Variables = {}

    def of(self, names: Sequence[str]) -> Variables:
        """Returns the frozen weights of some units, {unit: {path: array}}, none without any."""
        wanted = [name for name in names if self._units[name].frozen]
        drawn: dict[Any, Any] = {}
        for name in wanted:
            if name not in self._held:
                unit = self._units[name]
                # Whoever asks first may be tracing: these are arrays nevertheless.
                with jax.ensure_compile_time_eval():
                    params, _ = unit.draw(self.seed, drawn)
                    params |= self.given(unit)
                self._held[name] = {path: params[path] for path in unit.frozen}
        return {name: self._held[name] for name in wanted}

    def given(self, unit: Unit) -> Arrays:
        """Returns the weights of a unit, by path, that are not drawn from the seed."""
        if self.base is None:
            return {}
        weights = unit.weights
        return {path: jnp.array(a, weights[path].dtype) for path, a in self.base(unit).items()}

    def shapes(self, names: Sequence[str]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes of what ``of`` returns, without drawing."""
        return {name: dict(self._units[name].frozen) for name in names if self._units[name].frozen}
