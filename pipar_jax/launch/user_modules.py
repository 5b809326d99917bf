"""Whether the user's modules and the functions in them exist, without importing them.

A module is read as text: importing it could take seconds, load jax before its environment is set,
or fail for want of something that only a host has.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from comms.errors import explain
from pipar_jax.errors import ConfigError

#: A module with one of these may have any name.
_OPEN = ("__getattr__", "globals", "exec", "setattr", "vars")


def check_function(text: str, field: str, module: str, function: str) -> None:
    """Checks that a module exists and has a function, as far as its source says.

    Args:
      text: The field's value.
      field: Its dotted path.
      module: The module that it names.
      function: The function that it names.

    Raises:
      ConfigError: There is no such module, it is not Python, or nothing in it has the name.
    """
    if not is_importable(module):
        raise ConfigError(
            f"{field}={text!r}: there is no module {module!r} in the working directory, and none "
            "is installed"
        )
    try:
        spec = _find(module)
    except (ValueError, ImportError):  # see is_importable
        return
    origin = None if spec is None else spec.origin
    if origin is None or not (origin.endswith(".py") and os.path.lexists(origin)):
        return  # compiled, a namespace, or in an archive
    path = Path(origin)
    try:
        known = set(_names(ast.parse(path.read_bytes(), path.name)))
    except OSError as error:
        raise ConfigError(f"{field}={text!r}: {path} cannot be read: {explain(error)}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"{field}={text!r}: {path}{line} is not valid Python: {words}") from error
    if function not in known and not known.intersection(("*", *_OPEN)):
        raise ConfigError(f"{field}={text!r}: module {module!r} ({path}) has no {function!r}")


def is_importable(name: str) -> bool:
    """Returns whether a module can be found, without importing it or its parent packages."""
    try:
        return _find(name) is not None
    except (ValueError, ImportError):  # a module without a spec that is already loaded
        return True


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """Returns where a module is, without importing it or its parent packages; None if nowhere.

    Raises:
      ImportError: A parent is loaded and is not a package.
      ValueError: It is loaded, and not from anywhere.
    """
    where: list[str] | None = None
    spec = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        spec = (
            importlib.util.find_spec(full)
            if count == 1
            else importlib.machinery.PathFinder.find_spec(full, where)
        )
        if spec is None or (count < len(parts) and spec.submodule_search_locations is None):
            return None
        where = list(spec.submodule_search_locations or ())
    return spec


def _names(tree: ast.AST) -> Iterator[str]:
    """Yields the names that a module binds, ``*`` for all of another one, and what it may call.

    Bodies of functions and classes bind nothing in the module, but may call what does.
    """
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Global):
                        yield from inner.names
                    elif isinstance(inner, ast.Name) and inner.id in _OPEN:
                        yield inner.id
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
            case ast.Name():
                yield node.id
            case _:
                yield from _names(node)
