"""Names of traced units, from the paths of their variables."""

from __future__ import annotations

from collections.abc import Sequence

from stages.tracing.owners import Owner


def name_units(units: Sequence[Owner]) -> list[tuple[str, dict[str, str]]]:
    """Returns unit names, by the module that all variables of a unit are in.

    Without such a module a unit is named by its first and last module; units that share a module by
    their first module in it.

    Args:
      units: The variables of each unit, with paths such as "block/conv/kernel".

    Returns:
      For each unit its name, in which "_" stands for "/", and {path in the unit: path in the
      network}.
    """
    named: list[tuple[str, dict[str, str]]] = []
    commons = [_common(unit.ordered) for unit in units]
    taken: set[str] = set()
    for unit, common in zip(units, commons, strict=True):
        children = list(dict.fromkeys("_".join(_child(path, common)) for path in unit.ordered))
        name = "_".join(common)
        if not name:
            name = "_".join(dict.fromkeys((children[0], children[-1])))
        elif commons.count(common) > 1:
            name = children[0]
        if name.isdigit():
            name = f"unit_{name}"  # a number names a position
        number, plain = 2, name
        while name in taken:
            name, number = f"{plain}_{number}", number + 1
        taken.add(name)
        prefix = "".join(f"{part}/" for part in common)
        own = sorted((*unit.params, *unit.state))
        named.append((name, {path.removeprefix(prefix): path for path in own}))
    return named


def _common(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the longest path that all variables' modules begin with."""
    modules = [path.split("/")[:-1] for path in paths]
    common = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)


def _child(path: str, common: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the child of a common module that holds a variable."""
    parts = path.split("/")
    return tuple(parts[: max(1, min(len(common) + 1, len(parts) - 1))])
