"""Weights on disk: safetensors with keys ``unit/path``, which do not depend on the cut."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from comms.arrays import Array
from pipar_jax.disk.files import describe_reading, write_tensors
from pipar_jax.disk.json_text import JsonMapping, JsonObject, dumps
from pipar_jax.errors import RunError
from stages import Model
from stages.trees import Arrays, Variables


def save(
    path: Path, params: Mapping[str, Arrays], state: Mapping[str, Arrays], meta: JsonMapping
) -> None:
    """Writes weights and batch statistics.

    Args:
      path: The file.
      params: Weights by unit and path.
      state: Batch statistics by unit and path.
      meta: Facts for the file's header, as values for JSON.

    Raises:
      DiskError: The file cannot be written.
    """
    tensors = {
        f"{unit}/{name}": np.asarray(array, order="C")  # unlike ascontiguousarray, also [ ]
        for variables in (params, state)
        for unit, arrays in variables.items()
        for name, array in arrays.items()
    }
    write_tensors(path, tensors, {"pipar_jax": dumps(dict(meta))})


def facts(path: Path) -> JsonObject:
    """Returns the facts in the file's header.

    Raises:
      RunError: The file is missing or has no such header.
    """
    with reading(path), safe_open(path, framework="numpy") as file:
        found: JsonObject = json.loads((file.metadata() or {})["pipar_jax"])
        return found


def read_tensors(path: Path) -> dict[str, Array]:
    """Returns the arrays of a safetensors file by name.

    Raises:
      RunError: The file is missing, or is no safetensors file.
    """
    with reading(path), safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sort_tensors(
    tensors: Mapping[str, Array], model: Model, path: Path, without: Collection[str] = ()
) -> tuple[Variables, Variables]:
    """Returns weights and batch statistics of a model among arrays named ``unit/path``.

    Args:
      tensors: The arrays: those of the model, and no others.
      model: The model.
      path: Where they come from, for the message.
      without: Names of weights that are not expected.

    Raises:
      RunError: They belong to another model.
    """
    params: Variables = {}
    state: Variables = {}
    expected: set[str] = set()
    for unit in model.units:
        for variables, wanted in ((params, unit.params), (state, unit.state)):
            variables[unit.name] = {}
            for name, one in wanted.items():
                key = f"{unit.name}/{name}"
                if key in without:
                    continue
                expected.add(key)
                array = tensors.get(key)
                if array is None or not _fits(array, one):
                    found = "is missing" if array is None else f"is {array.dtype}{[*array.shape]}"
                    raise RunError(
                        f"{path}: {key} {found}, but model {model.name!r} expects "
                        f"{one.dtype}{list(one.shape)}: load it with the model that it was trained "
                        "with"
                    )
                variables[unit.name][name] = array  # type: ignore[assignment]
    unknown = sorted(tensors.keys() - expected)
    if unknown:
        raise RunError(
            f"{path} has {len(unknown)} tensors that model {model.name!r} does not have, such as "
            f"{unknown[0]}: load it with the model that it was trained with"
        )
    return params, state


def _fits(array: Array, expected: Any) -> bool:
    """Returns whether an array has the expected dtype and shape; jax may be limited to 32 bits."""
    dtypes = array.dtype, jax.dtypes.canonicalize_dtype(array.dtype)
    return array.shape == expected.shape and expected.dtype in dtypes


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of reading a file into a ``RunError``.

    Args:
      path: The file.

    Raises:
      RunError: It cannot be read.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(
            f"{path} cannot be read as weights of a run: {describe_reading(error)}"
        ) from error
