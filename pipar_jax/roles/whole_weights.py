"""All weights that a run, one of its checkpoints or a file has, and what is missing and why.

A checkpoint holds what is trained and averaged. Frozen weights are the same in all of a run, and
come from where the run had them: the seed, ``model.base``, or code of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comms.arrays import Array
from pipar_jax.config import from_dict
from pipar_jax.config.checkpoints import CHECKPOINTS, weights_of
from pipar_jax.errors import PiparError, RunError
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.roles.admission import describe
from pipar_jax.roles.checkpoint_store import Kept, read
from pipar_jax.roles.past import check_base
from pipar_jax.roles.start_weights import global_tensors
from pipar_jax.runtime.setup import build_model, set_up_jax
from pipar_jax.training import checkpoint
from stages.errors import StageError


class WholeWeights(NamedTuple):
    """Weights and statistics by ``unit/path``.

    Attributes:
      tensors: The arrays.
      personal: Names of weights that are not among them, since each device has its own.
      lacking: Which other weights are not, and why, in one line; empty if none are missing.
    """

    tensors: Mapping[str, Array]
    personal: tuple[str, ...]
    lacking: str = ""


def whole_weights(path: Path) -> WholeWeights:
    """Returns the weights that are at a path, frozen ones included.

    Args:
      path: The folder of a run, one of its checkpoints, or a safetensors file.

    Raises:
      ConfigError: There are none.
      RunError: They cannot be read.
    """
    where, rounds = weights_of(path, str(path))
    if rounds is None:
        tensors = checkpoint.read_tensors(where)
        return WholeWeights(tensors, _personal_of(where))
    kept = read(where, rounds)
    tensors = dict(global_tensors(kept))
    named = (f"{unit}/{name}" for unit, arrays in kept.facts["model"].items() for name in arrays)
    personal = tuple(name for name in named if name not in tensors)
    if kept.facts.get("frozen") == {}:
        return WholeWeights(tensors, personal)
    try:
        frozen = _frozen(kept, where / CHECKPOINTS / str(rounds))
    except (PiparError, StageError) as error:
        units = ", ".join(kept.facts.get("frozen", {})) or "all units"
        return WholeWeights(tensors, personal, f"the frozen weights of {units}: {error}")
    return WholeWeights({**tensors, **frozen}, personal)


def _personal_of(file: Path) -> tuple[str, ...]:
    """Returns the names of the personal weights that a file lacks; of a foreign file none."""
    try:
        return tuple(checkpoint.facts(file)["personal"])
    except (RunError, KeyError):
        return ()


def _frozen(kept: Kept, where: Path) -> dict[str, Array]:
    """Returns the frozen weights of a checkpoint's network, by ``unit/path``.

    Raises:
      PiparError: They are not known here, or are others now.
      StageError: The network cannot be made.
    """
    facts: Mapping[str, Any] = kept.facts
    config = from_dict(facts["config"])
    if "signature" not in facts:  # of a version that did not keep it
        if not (config.model.trainable or config.lora.match):
            return {}
        raise RunError(
            f"{where} is of a version that did not keep the shapes of samples, without which no "
            "network is made: go on with the run, and take its weights when it is over"
        )
    set_up_jax(config.model)
    model = build_model(config, SIGNATURE.read(facts["signature"], "signature"))
    if describe(model) != facts["model"]:
        raise RunError(
            f"{where} is not of the network that model.name={config.model.name!r} is here: take "
            "the weights of the run when it is over"
        )
    check_base(facts, model, config.model.base, where)
    return {
        f"{unit}/{name}": np.asarray(array)
        for unit, arrays in model.frozen.of(model.unit_names).items()
        for name, array in arrays.items()
    }
