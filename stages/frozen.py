"""Weights that are not trained: drawn where they are needed, once in a process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from stages.trees import Variables
from stages.unit import Unit


class Frozen:
    """Frozen weights of a model, of those units that a process asks for.

    Every host draws them itself, from the same seed or the user's own function, and all replicas of
    a unit use one copy. So they never cross a link.
    """

    def __init__(self, units: Sequence[Unit], seed: int) -> None:
        """Keeps in mind how they are drawn.

        Args:
          units: The model's units.
          seed: Root seed.
        """
        self._units = {unit.name: unit for unit in units}
        self._seed = seed
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
                    params, _ = unit.draw(self._seed, drawn)
                self._held[name] = {path: params[path] for path in unit.frozen}
        return {name: self._held[name] for name in wanted}

    def shapes(self, names: Sequence[str]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes of what ``of`` returns, without drawing."""
        return {name: dict(self._units[name].frozen) for name in names if self._units[name].frozen}
