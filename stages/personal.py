"""Weights that each device trains and keeps for itself: never averaged, never sent.

Arivazhagan et al., Federated Learning with Personalization Layers (FedPer), arXiv 1912.00818: the
base layers are averaged, the personalisation layers are not.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from stages.errors import StageError
from stages.model import Model
from stages.patterns import matching
from stages.trees import Arrays


def personalise(model: Model, pattern: str) -> Model:
    """Returns the model with some of its trained weights personal.

    Args:
      model: The model, with its frozen weights.
      pattern: A regular expression that is searched for in the names ``unit/path`` of the weights
        that are trained.

    Raises:
      StageError: It matches none of them, or all, or is not valid.
    """
    trained = {unit.name: unit.params for unit in model.units}
    paths = matching(trained, pattern)
    count, of = sum(map(len, paths.values())), sum(map(len, trained.values()))
    if count in (0, of):
        names = [f"{unit}/{path}" for unit, params in trained.items() for path in params]
        what = (
            "no trained weight matches"
            if count == 0
            else "all trained weights match, so that nothing would be averaged:"
        )
        raise StageError(
            f"model {model.name!r}: {what} {pattern!r}; its trained weights are "
            f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        )
    return model.with_units([unit.personalising(paths[unit.name]) for unit in model.units])


def personal_paths(model: Model) -> dict[str, frozenset[str]]:
    """Returns the paths of the personal weights of the units that have some."""
    return {unit.name: unit.personal for unit in model.units if unit.personal}


def personal_names(model: Model) -> list[str]:
    """Returns the names, ``unit/path``, of the personal weights in order."""
    return [
        f"{unit.name}/{path}"
        for unit in model.units
        for path in unit.params
        if path in unit.personal
    ]


def shared(model: Model, params: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Arrays]:
    """Returns the weights of units without those that are personal."""
    units = {unit.name: unit.personal for unit in model.units}
    return {
        unit: {path: array for path, array in arrays.items() if path not in units[unit]}
        for unit, arrays in params.items()
    }


def personal(model: Model, params: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Arrays]:
    """Returns the personal weights of the units that have some."""
    return {
        unit: {path: params[unit][path] for path in params[unit] if path in paths}
        for unit, paths in personal_paths(model).items()
    }
