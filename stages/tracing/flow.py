"""The data flow of a flat network: the equations on the samples' path, and what they need.

The samples' path is the chain of equations between the input and the output. What depends on
weights, constants, side inputs or random keys alone is computed where needed, even twice.
What only leads to a new state (running statistics) is computed as soon as it can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend import core as jex_core

from stages.tracing.flat import Flat
from stages.trees import Atom, Jaxpr, PyTree


@dataclasses.dataclass(frozen=True)
class Step:
    """An equation on the samples' path.

    Attributes:
      index: Its index among the jaxpr's equations.
      level: It lies before every cut k >= level, and behind all others.
      variables: Paths of the weights and the state that it needs, directly or through values
        computed from them alone.
      inputs: Its inputs that depend on the samples.
    """

    index: int
    level: int
    variables: frozenset[str]
    inputs: tuple[Atom, ...]


class Flow:
    """The samples' path through a network.

    Attributes:
      flat: The equations.
      steps: All equations that depend on the samples and that something needs, by level.
      length: Number of equations on the path to the output; a cut k lies behind the k-th of them.
      first: Paths of the state that becomes the samples themselves.
    """

    def __init__(self, flat: Flat) -> None:
        """Finds the dependencies."""
        self.flat = flat
        jaxpr = flat.jaxpr
        self._paths = {var: path for path, var in {**flat.params, **flat.state}.items()}
        source = next(iter(flat.inputs.values()))
        self._data = {source}
        self._deps: dict[Atom, frozenset[str]] = {
            var: frozenset((path,)) for var, path in self._paths.items()
        }
        for equation in jaxpr.eqns:
            taken = _variables(equation.invars)
            if any(var in self._data for var in taken):
                self._data.update(equation.outvars)
            else:
                needs = frozenset[str]().union(*(self._deps.get(var, ()) for var in taken))
                self._deps.update(dict.fromkeys(equation.outvars, needs))
        becomes: dict[Atom, set[str]] = {}
        for path, var in flat.state_after.items():
            if not isinstance(var, jex_core.Literal) and var is not flat.state[path]:
                becomes.setdefault(var, set()).add(path)
        spine = _leading_to(jaxpr, _variables([flat.output]))
        effects = {i for i, equation in enumerate(jaxpr.eqns) if equation.effects}
        seen = [v for i in sorted(effects) for v in _variables(jaxpr.eqns[i].invars)]
        wanted = spine | effects | _leading_to(jaxpr, [*becomes, *seen])
        self.first = frozenset(becomes.get(source, ()))
        self._available: dict[Atom, int] = {source: 0}
        self.length = 0
        steps = []
        for index, equation in enumerate(jaxpr.eqns):
            inputs = tuple(v for v in _variables(equation.invars) if v in self._data)
            if index not in wanted or not inputs:
                continue
            level = max(self._available[var] for var in inputs)
            if index in spine:
                self.length += 1
                level = self.length
            self._available.update(dict.fromkeys(equation.outvars, level))
            needs = frozenset[str]().union(
                *(self._deps.get(var, ()) for var in _variables(equation.invars)),
                *(becomes.get(var, ()) for var in equation.outvars),
            )
            steps.append(Step(index, level, needs, inputs))
        self.steps = tuple(sorted(steps, key=lambda step: step.level))
        self.used = frozenset[str]().union(self.first, *(step.variables for step in steps))
        self._last: dict[Atom, int] = {}
        for step in self.steps:
            for var in step.inputs:
                self._last[var] = max(self._last.get(var, 0), step.level)
        if flat.output in self._data:
            self._last[flat.output] = self.length + 1

    @property
    def is_of_samples(self) -> bool:
        """Whether the output depends on the samples at all."""
        return self.flat.output in self._data

    def is_data(self, var: Atom) -> bool:
        """Returns whether a variable depends on the samples."""
        return var in self._data

    def live(self, cut: int) -> list[Atom]:
        """Returns the values computed from the samples before a cut and needed behind it."""
        return [var for var, last in self._last.items() if self._available[var] <= cut < last]

    def live_everywhere(self) -> list[list[Atom]]:
        """Returns ``live`` for every position from 0 to ``length``."""
        live: list[list[Atom]] = [[] for _ in range(self.length + 1)]
        for var, last in self._last.items():
            for cut in range(self._available[var], min(last, self.length + 1)):
                live[cut].append(var)
        return live

    def left(self) -> list[frozenset[str]]:
        """Returns for every position the variables that are used before it."""
        return self._running(range(self.length + 1), lambda step, cut: step.level <= cut)

    def right(self) -> list[frozenset[str]]:
        """Returns for every position the variables that are used behind it."""
        return self._running(range(self.length + 1), lambda step, cut: step.level > cut)

    def _running(self, cuts: range, holds: PyTree) -> list[frozenset[str]]:
        by_level: dict[int, frozenset[str]] = {}
        for step in self.steps:
            by_level[step.level] = by_level.get(step.level, frozenset()) | step.variables
        rows = [Step(0, level, needs, ()) for level, needs in by_level.items() if needs]
        rows.append(Step(0, 0, self.first, ()))
        return [
            frozenset[str]().union(*(row.variables for row in rows if holds(row, cut)))
            for cut in cuts
        ]


def _variables(atoms: Sequence[Atom]) -> list[Atom]:
    return [atom for atom in atoms if not isinstance(atom, jex_core.Literal)]


def _leading_to(jaxpr: Jaxpr, ends: list[Atom]) -> set[int]:
    """Returns the indices of the equations that compute some variables."""
    needed = set(ends)
    indices = set()
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        if any(var in needed for var in equation.outvars):
            indices.add(index)
            needed.update(_variables(equation.invars))
    return indices
