"""A name means one thing: no public class or type has the name of another one."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

from tests.sources import ROOT, modules

PRODUCT = ("comms", "stages", "pipar_jax")


def _types(body: list[ast.stmt]) -> Iterator[str]:
    """Yields the public classes and type aliases that a module defines."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and ast.unparse(node.annotation) == "TypeAlias"
        ):
            name = node.target.id
        else:
            continue
        if not name.startswith("_"):
            yield name


def _defined() -> dict[str, list[str]]:
    """Returns each name and the modules that define it."""
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        if module.split(".")[0] in PRODUCT:
            for name in _types(ast.parse((ROOT / path).read_text(encoding="utf-8")).body):
                found[name].append(module)
    return found


def test_no_two_public_types_have_one_name() -> None:
    twice = {name: places for name, places in _defined().items() if len(places) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(places)}" for name, places in twice.items())


def test_arrays_and_their_types_go_by_their_names() -> None:
    """``comms.arrays`` names them: Array, Bytes and DType; ``stages.arrays`` likewise."""
    spelled = re.compile(r"\b(ndarray|dtype|NDArray)\[Any\b")
    found = [
        f"{path}:{number}"
        for module, path in modules().items()
        if module.split(".")[0] in PRODUCT and module not in ("comms.arrays", "stages.arrays")
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").split("\n"), 1)
        if spelled.search(line)
    ]
    assert not found, ", ".join(found)
    assert spelled.search("x: np.ndarray[Any, Any]") and spelled.search("np.dtype[Any]")


def test_classes_and_aliases_are_found() -> None:
    found = _defined()
    assert found["Plan"] == ["pipar_jax.schedule.plan"]
    assert found["Variables"] and len(found) > 200
    source = "class A: pass\nclass _B: pass\nC: TypeAlias = int\nd: int = 1\n"
    assert list(_types(ast.parse(source).body)) == ["A", "C"]
