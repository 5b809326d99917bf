"""Finds variables that two units of a model share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from stages.errors import StageError
from stages.trees import PyTree
from stages.variables import text_of


def check_apart(model: str, modules: Mapping[str, Any]) -> None:
    """Rejects units that share a variable, which a cut would split into two.

    A variable that is shared within a unit is allowed. Random streams are drawn separately for
    every unit and may be shared.

    Args:
      model: The model's name, for messages.
      modules: Modules by name of the unit; shared variables are the same object in both.

    Raises:
      StageError: Two units share a variable; the message names both places.
    """
    seen: dict[int, tuple[str, str]] = {}
    for unit, module in modules.items():
        own = {}
        for path, node in _holders(module):
            if id(node) in seen:
                other, where = seen[id(node)]
                what = "module" if isinstance(node, nnx.Module) else "variable"
                here, there = (
                    f"{name}/{inner}" if inner else name
                    for name, inner in ((unit, path), (other, where))
                )
                raise StageError(
                    f"model {model!r}: units {other!r} and {unit!r} share a {what} of type "
                    f"{type(node).__name__}: {there} is {here}. A cut between them would "
                    "duplicate it: put all its users into one unit, or give each unit its own"
                )
            own[id(node)] = unit, path
        seen |= own


def _holders(module: Any) -> Iterator[tuple[str, Any]]:
    """Yields variables and the modules that contain them, outer ones first, with their paths."""
    nodes = list(nnx.iter_graph(module))
    held = [path for path, node in nodes if _is_variable(node)]
    for path, node in sorted(nodes, key=lambda item: len(item[0])):
        holds = isinstance(node, nnx.Module) and any(path == inner[: len(path)] for inner in held)
        if holds or _is_variable(node):
            yield text_of(path), node


def _is_variable(node: PyTree) -> bool:
    """Whether a node is a variable that is not random."""
    return isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
