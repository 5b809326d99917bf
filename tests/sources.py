"""The project's own sources, as tests about the project as a whole read them."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("comms", "stages", "pipar_jax", "configs", "experiments")


class Import(NamedTuple):
    """One imported module and where: ``eager`` ones run when their module is imported."""

    module: str
    line: int
    eager: bool


@cache
def files() -> tuple[Path, ...]:
    """Return the files of the project, relative to its root: those git has or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = (Path(name) for name in sorted(set(listing.split("\0"))) if name)
    return tuple(path for path in paths if (ROOT / path).is_file())


@cache
def modules() -> dict[str, Path]:
    """Return the modules of the five packages: dotted name to path relative to the root."""
    found = {}
    for path in files():
        if path.suffix == ".py" and path.parts[0] in PACKAGES:
            parts = path.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Return what the module ``name`` imports, imports for type checkers alone left out."""
    path = modules()[name]
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(tree.body, package, eager=True))


def _imports(body: list[ast.stmt], package: str, *, eager: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(module, node.lineno, eager) for module in _named(node, package))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse, package, eager=eager)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for block in ("body", "orelse", "finalbody"):
                yield from _imports(getattr(node, block, []), package, eager=eager and not inside)
            for block in ("handlers", "cases"):
                for part in getattr(node, block, []):
                    yield from _imports(part.body, package, eager=eager)


def _named(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """Yield the modules of ``from … import …``: each name that is a module, else its parent."""
    base = node.module or ""
    if node.level:
        parts = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parts, *([base] if base else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in modules() else base
