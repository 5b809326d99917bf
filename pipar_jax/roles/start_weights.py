"""The weights that a run starts from: those of another run, of a checkpoint, or of a file."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comms.arrays import Array
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import weights_of
from pipar_jax.config.texts import split_list
from pipar_jax.errors import ConfigError
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.checkpoint_store import Kept, read
from pipar_jax.training.base_weights import to_units
from pipar_jax.training.checkpoint import read_tensors, sort_tensors
from stages import Model
from stages.personal import personal_paths

Variables = dict[str, dict[str, Any]]


def first_variables(model: Model, config: Config) -> tuple[Variables, Variables]:
    """Returns the weights and statistics with which a run begins.

    Args:
      model: The whole model.
      config: The run's configuration.

    Raises:
      ConfigError: ``model.weights`` has no weights, or a pattern of ``model.weights_match`` matches
        none.
      RunError: The weights cannot be read, or belong to another model.
    """
    params, state = model.init(config.seed)
    if not config.model.weights:
        return params, state
    path = Path(config.model.weights)
    return start_weights(path, config.model.weights_match, model, params, state)


def start_weights(
    path: Path, match: str, model: Model, params: Variables, state: Variables
) -> tuple[Variables, Variables]:
    """Returns weights and statistics to start from.

    Args:
      path: The folder of a run, one of its checkpoints, or a safetensors file with keys
        ``unit/path``, or for GPT-2 in the layout of Hugging Face. It may lack personal weights.
      match: Patterns of names to take, separated by commas, such as ``conv*/kernel``; empty: all,
        which must be there then.
      model: The whole model.
      params: Weights from the seed, by unit and path.
      state: Batch statistics likewise.

    Raises:
      ConfigError: There are no weights, or a pattern matches none.
      RunError: They cannot be read, or belong to another model.
    """
    tensors = to_units(load_tensors(path), model)
    if not match:
        drawn = {
            f"{unit}/{name}": np.asarray(params[unit][name])
            for unit, names in personal_paths(model).items()
            for name in names
        }
        return sort_tensors(drawn | _without_frozen(tensors, model, path), model, path)
    own = {f"{unit}/{name}" for part in (params, state) for unit, arrays in part.items()
           for name in arrays}  # fmt: skip
    taken: set[str] = set()
    for pattern in split_list(match):
        found = {name for name in own if fnmatch.fnmatchcase(name, pattern)}
        if not found or not found & tensors.keys():
            where = "the model" if not found else str(path)
            known = sorted(own if not found else tensors)[:5]
            raise ConfigError(
                f"model.weights_match={match!r}: {pattern!r} matches no weight of {where} (its "
                f"first are {', '.join(known)})"
            )
        taken |= found & tensors.keys()
    mixed = {
        f"{unit}/{name}": np.asarray(array)
        for part in (params, state)
        for unit, arrays in part.items()
        for name, array in arrays.items()
    }
    mixed |= {name: tensors[name] for name in taken}
    return sort_tensors(mixed, model, path)


def _without_frozen(tensors: Mapping[str, Array], model: Model, path: Path) -> dict[str, Array]:
    """Returns the arrays but those of frozen weights, which a run that is over has as well.

    Raises:
      ConfigError: They are not those that the model has.
    """
    left = dict(tensors)
    for unit, arrays in model.frozen.of(model.unit_names).items():
        for name, array in arrays.items():
            there = left.pop(f"{unit}/{name}", None)
            own = np.asarray(array)
            if there is not None and not np.array_equal(there.astype(own.dtype), own):
                raise ConfigError(
                    f"model.weights={str(path)!r}: {unit}/{name} is frozen, and not what this run "
                    "has there: name a file of frozen weights with model.base, or take the seed, "
                    "model.base and model.trainable of the run that the weights are of"
                )
    return left


def load_tensors(path: Path) -> Mapping[str, Array]:
    """Returns the weights and statistics that a run, a checkpoint or a file has, by ``unit/path``.

    Raises:
      ConfigError: There are none.
      RunError: They cannot be read.
    """
    where, rounds = weights_of(path, str(path))
    return read_tensors(where) if rounds is None else global_tensors(read(where, rounds))


def global_tensors(kept: Kept) -> Mapping[str, Array]:
    """Returns the global weights and statistics of a checkpoint, by ``unit/path``."""
    prefixes = f"{EVERY}/params/", f"{EVERY}/state/"
    return {
        name.removeprefix(prefix): array
        for name, array in kept.tensors.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
