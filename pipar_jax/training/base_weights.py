"""Weights from a file that every host has: its own layout, or that of Hugging Face for GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import safe_open

from comms.arrays import Array
from pipar_jax.errors import RunError
from pipar_jax.training.checkpoint import reading
from stages import Model
from stages.frozen import Base
from stages.models.gpt2 import find_weight
from stages.unit import Unit


def based(model: Model, path: Path) -> Model:
    """Returns a model whose weights come from a file.

    Only names and shapes are read here; a host reads the weights of the units that it holds. Every
    frozen weight has to be in the file; weights that are trained and are not, such as adapters or a
    new head, come from the seed.

    Args:
      model: The model, with its frozen weights.
      path: A safetensors file.

    Raises:
      RunError: The file cannot be read, lacks a frozen weight, or has one of another shape.
    """
    with reading(path), safe_open(path, framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    names = {name: name for name in shapes}
    for unit in model.units:
        for weight, one in unit.weights.items():
            known = _find(names, model, unit.name, weight)
            if known is None:
                if weight in unit.frozen:
                    some = ", ".join(sorted(shapes)[:4])
                    raise RunError(
                        f"model.base={str(path)!r} has no weight {unit.name}/{weight} of model "
                        f"{model.name!r}, which is not trained (its first are {some})"
                    )
                continue
            name, transposed = known
            shape = shapes[name][::-1] if transposed else shapes[name]
            if shape != one.shape:
                raise RunError(
                    f"model.base={str(path)!r}: {name} has the shape {list(shape)}, but "
                    f"{unit.name}/{weight} of model {model.name!r} needs {list(one.shape)}: check "
                    "model.args"
                )
    return model.based(_reader(model, path, names))


def _reader(model: Model, path: Path, names: Mapping[str, str]) -> Base:
    """Returns what reads the weights of a unit."""

    def read(unit: Unit) -> dict[str, Array]:
        weights = {}
        with reading(path), safe_open(path, framework="numpy") as file:
            for weight in unit.weights:
                if (known := _find(names, model, unit.name, weight)) is not None:
                    array = file.get_tensor(known[0])
                    weights[weight] = array.T if known[1] else array
        return weights

    return read


def digest(model: Model, unit: Unit) -> str:
    """Returns 32 letters that depend on the weights that a unit does not draw from the seed.

    They are those of the weights as they are used: in the unit's dtypes, whatever the layout of the
    file. Empty if there are none.
    """
    given = {} if model.frozen.base is None else model.frozen.base(unit)
    if not given:
        return ""
    made = xxhash.xxh3_128()
    for path, array in sorted(given.items()):
        used = np.ascontiguousarray(array, unit.weights[path].dtype)
        made.update(f"{path} {used.dtype} {used.shape};".encode())
        made.update(used.reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def to_units(tensors: Mapping[str, Array], model: Model) -> Mapping[str, Array]:
    """Returns the arrays of a file by ``unit/path``, also of one in the layout of Hugging Face.

    Args:
      tensors: The arrays, by their names in the file.
      model: The model that they are for; its trained weights alone are returned from such a file.
    """
    if not _is_gpt2(model) or "embed/tokens" in tensors:
        return tensors
    made = {}
    for unit in model.units:
        for weight in unit.params:
            if (known := find_weight(tensors, unit.name, weight)) is not None:
                array, transposed = known
                made[f"{unit.name}/{weight}"] = array.T if transposed else array
    return made


def _find(
    names: Mapping[str, str], model: Model, unit: str, weight: str
) -> tuple[str, bool] | None:
    """Returns the name of a weight in a file, and whether it is transposed there."""
    if (name := f"{unit}/{weight}") in names:
        return name, False
    return find_weight(names, unit, weight) if _is_gpt2(model) else None


def _is_gpt2(model: Model) -> bool:
    return model.recipe is not None and model.recipe["name"] == "gpt2"
