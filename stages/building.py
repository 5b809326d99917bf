"""Builds the units of a model without computing: their static parts, and shapes of variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import linen, nnx

from stages.errors import StageError
from stages.foreign import describe
from stages.sharing import check_apart
from stages.trees import Path, PyTree
from stages.unit import Factory, ModuleUnit
from stages.variables import abstract, divide, text_of

T = TypeVar("T")


def abstractly(build: Callable[[], T]) -> T:
    """Calls a function while jax traces, so that no array is computed."""
    made: list[T] = []
    jax.eval_shape(lambda: made.append(build()))
    return made[0]


def build_units(
    model: str, pairs: Sequence[tuple[str, Factory]], modules: Sequence[Any]
) -> list[ModuleUnit]:
    """Creates units from their modules while these are traced.

    Args:
      model: The model's name, for messages.
      pairs: Name of each unit and factory of its module.
      modules: The units' modules.

    Raises:
      StageError: A name is not valid, two units share a variable, or a module has a variable that
        cannot be trained; the message names the unit.
    """
    names = [unit for unit, _ in pairs]
    illegal = next((n for n in names if not n or "/" in n), None)
    if illegal is not None:
        raise StageError(f"unit name {illegal!r} is empty or contains '/': choose another")
    repeated = sorted({n for n in names if names.count(n) > 1})
    if not names:
        raise StageError(f"model {model!r} has no units: give at least one")
    if repeated:
        raise StageError(f"model {model!r}: names of units repeat among {names}; rename {repeated}")
    check_apart(model, dict(zip(names, modules, strict=True)))
    return [_build_unit(*pair, module) for pair, module in zip(pairs, modules, strict=True)]


def build_module(name: str, factory: Factory, *, is_unit: bool = True) -> Any:
    """Calls the factory of a module, while it is traced.

    Args:
      name: The unit's name, or the model's, for messages.
      factory: The factory.
      is_unit: Whether the module is a unit, rather than one that has units as attributes.

    Raises:
      StageError: The factory fails or does not return an NNX module.
    """
    what = f"unit {name!r}" if is_unit else f"model {name!r}"
    try:
        module = factory(nnx.Rngs(0))
    except StageError:
        raise
    except Exception as error:  # the user's code: any exception is reported with its line
        raise StageError(f"{what}: its factory failed: {describe(error)}") from error
    if is_unit:
        return check_module(name, module)
    if not isinstance(module, nnx.Module):
        raise StageError(
            f"{what}: its factory returned {type(module).__name__}, expected an NNX module that "
            "has the units as attributes"
        )
    return module


def module_at(model: str, module: Any, path: str) -> Any:
    """Follows a path such as "blocks/0" through attributes and list entries.

    Args:
      model: The model's name, for messages.
      module: The module to begin with.
      path: The path.

    Raises:
      StageError: There is nothing at it.
    """
    for part in path.split("/"):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError, KeyError) as error:
            raise StageError(
                f"model {model!r}: the module has no unit {path!r} ({error}); name attributes "
                "of the module, list entries as 'blocks/0'"
            ) from error
    return module


def check_module(unit: str, module: Any) -> Any:
    """Checks and returns a unit's module.

    Raises:
      StageError: It is not a callable NNX module.
    """
    if isinstance(module, linen.Module):
        raise StageError(
            f"unit {unit!r} is {type(module).__name__} of flax.linen, expected an NNX module; wrap "
            "it: nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(example)"
        )
    if not isinstance(module, nnx.Module) or not callable(module):
        raise StageError(
            f"unit {unit!r} is {type(module).__name__}, expected a callable NNX module; define "
            "__call__(self, x)"
        )
    return module


def _build_unit(name: str, factory: Factory, module: Any) -> ModuleUnit:
    """Returns a unit's static part and the shapes of its variables.

    Args:
      name: The unit's name.
      factory: Creates its module.
      module: The module, which is being traced.

    Raises:
      StageError: The module has a variable that cannot be trained; the message names it.
    """
    for path, node in nnx.iter_graph(module):
        _check_node(f"unit {name!r}, {text_of(path) or type(node).__name__}", node)
    nnx.pop(module, (nnx.Intermediate, nnx.Perturbation))  # sown during construction
    parts = divide(module)
    groups = parts.params, parts.state, parts.streams
    params, state, streams = (abstract(name, leaves) for leaves in groups)
    _check_containers(name, module, [path for leaves in groups for path in leaves])
    paths = {text_of(path): path for leaves in groups for path in leaves}
    if len(paths) < sum(map(len, groups)):
        twice = sorted((params.keys() & state.keys()) | (streams.keys() & {*params, *state}))
        raise StageError(f"unit {name!r}: two variables have the name {twice[0]!r}: rename one")
    return ModuleUnit(
        name, parts.graph, params, state, factory, streams, paths, is_ours=_is_ours(module)
    )


def _check_node(where: str, node: PyTree) -> None:
    """Rejects modules that cannot be trained, or whose variables would not be found."""
    if isinstance(node, nnx.MultiHeadAttention) and node.decode:
        raise StageError(
            f"{where}: an attention with decode=True takes one token at a time, in which nothing "
            "can be trained: build it with decode=False"
        )
    if isinstance(node, nnx.Module) and not isinstance(node, nnx.bridge.ToNNX):
        inner = [a for a, value in vars(node).items() if isinstance(value, linen.Module)]
        if inner:
            raise StageError(
                f"{where}: attribute {inner[0]!r} is a module of flax.linen; wrap it: "
                "nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(example)"
            )


def _check_containers(unit: str, module: Any, known: Sequence[Path]) -> None:
    """Rejects arrays in plain lists and dictionaries, which Flax does not treat as data."""
    for path, node in nnx.iter_graph(module):
        for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
            held = isinstance(value, (list, tuple, dict)) and jax.tree.leaves(value)
            inside = (*path, name)
            if not held or any(other[: len(inside)] == inside for other in known):
                continue
            if any(isinstance(leaf, jax.Array) for leaf in held):
                raise StageError(
                    f"unit {unit!r}: attribute {text_of(inside)!r} contains arrays in a "
                    f"{type(value).__name__}, where Flax does not find them: use an nnx.List or "
                    "nnx.Dict"
                )


def _is_ours(module: Any) -> bool:
    """Returns whether a module consists of this package's layers only."""
    return all(
        type(node).__module__.partition(".")[0] == "stages" or type(node) is nnx.List
        for _, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    )
