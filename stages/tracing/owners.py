"""Which unit of a traced network owns which variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stages.tracing.cutting import Cut
from stages.tracing.flow import Flow
from stages.tracing.networks import Network


class Owner(NamedTuple):
    """A unit's variables.

    Attributes:
      params: Paths of its weights, sorted.
      state: Paths of its state, sorted.
      ordered: The used variables, in the order of use; all variables if none is used.
    """

    params: tuple[str, ...]
    state: tuple[str, ...]
    ordered: tuple[str, ...]


def assign(
    network: Network,
    train: Flow,
    inference: Flow,
    cuts: Sequence[Cut],
    positions: Sequence[int | None],
) -> list[Owner]:
    """Assigns each variable to the unit that uses it, and an unused one to a unit of its module.

    Args:
      network: The network.
      train: Its call in training.
      inference: Its call at inference.
      cuts: The cuts.
      positions: Their positions at inference.
    """
    home: dict[str, int] = {}
    for path in train.used:
        home[path] = sum(path not in cut.left for cut in cuts)
    for step in inference.steps:
        for path in step.variables:
            bounds = [position for position in positions if position is not None]
            home.setdefault(path, sum(step.level > bound for bound in bounds))
    order = [
        path
        for flow in (train, inference)
        for step in flow.steps
        for path in sorted(step.variables)
    ]
    for path in sorted({*network.params, *network.state} - home.keys()):
        near = max(sorted(home), key=lambda known: _shared(known, path), default=path)
        home[path] = home.get(near, 0)
    return [
        Owner(
            tuple(sorted(param for param in network.params if home[param] == unit)),
            tuple(sorted(name for name in network.state if home[name] == unit)),
            tuple(unit_path for unit_path in dict.fromkeys(order) if home[unit_path] == unit)
            or tuple(sorted(home)),
        )
        for unit in range(len(cuts) + 1)
    ]


def _shared(path: str, other: str) -> int:
    """Returns the number of leading parts that two paths share."""
    pairs = enumerate(zip(path.split("/"), other.split("/"), strict=False))
    return next((index for index, (a, b) in pairs if a != b), 0)
