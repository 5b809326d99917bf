"""Samples to predict, checked like the arrays that a run is trained on."""

from __future__ import annotations

import numpy as np

from comms.arrays import Array
from pipar_jax.data.admission import as_array, by_name, check_array
from pipar_jax.data.padding import stack_all
from pipar_jax.data.types import fitted
from pipar_jax.errors import DataError
from stages.signature import INPUT, Signature


def make_queries(
    inputs: object, signature: Signature, stored: str, longest: int = 0
) -> dict[str, Array]:
    """Returns inputs to predict by name, [batch, …] each, stored like the training data.

    Args:
      inputs: Raw inputs, not normalised, as for training: an array or arrays by name.
      signature: What the model takes.
      stored: Dtype of the run's test input, such as ``uint8`` or ``float32``.
      longest: To what samples of different lengths are padded; 0: all are equally long.

    Raises:
      DataError: There is no sample, an array too many, or shape, dtype or range differs.
    """
    given = by_name(inputs, INPUT, "predict")
    if longest:
        given, _, _ = stack_all(given, {}, 0, "predict")
    if unknown := sorted(given.keys() - {INPUT, *signature.sides}):
        known = ", ".join((INPUT, *signature.sides))
        raise DataError(f"predict: the network takes {known}, and got {unknown[0]!r}: leave it out")
    made: dict[str, Array] = {}
    for name, wanted in ((INPUT, signature.input), *signature.sides.items()):
        expected = "[batch" + "".join(f", {size}" for size in wanted.shape) + "]"
        what = "inputs" if name == INPUT else f"side input {name}"
        if name not in given:
            raise DataError(f"predict: there is no {name!r}: pass {{'x': …, {name!r}: …}}")
        raw = as_array(given[name], f"predict: {what}")
        if longest and wanted.shape[:1] == (longest,) and 1 < raw.ndim == len(wanted.shape) + 1:
            raw = fitted(raw, max(longest, raw.shape[1]), 0)  # one that is too long is refused
        if raw.shape == wanted.shape:
            raise DataError(
                f"predict: {what} must be {expected}, got one of shape {raw.shape}: write x[None]"
            )
        if raw.shape[1:] != wanted.shape or not raw.ndim:
            raise DataError(f"predict: {what} must be {expected}, got shape {raw.shape}")
        if not len(raw):
            raise DataError(f"predict: there is no sample: expected {expected}, got {raw.shape}")
        if len(raw) != len(made.get(INPUT, raw)):
            raise DataError(
                f"predict: {what} has {len(raw)} samples, expected {len(made[INPUT])} as input x"
            )
        made[name] = check_array(raw, f"predict: {what}")
    _check_scale(made[INPUT], stored)
    return made


def _check_scale(x: Array, stored: str) -> None:
    """Checks that an input to predict has the scale of the training data."""
    if stored == "uint8":
        if x.dtype.kind not in "iu" or x.min() < 0 or x.max() > 255:
            raise DataError(
                f"predict: the run was trained on uint8, 0 to 255, and got {x.dtype} from "
                f"{x.min():g} to {x.max():g}: pass inputs as stored; they are normalised here"
            )
    elif x.dtype == np.uint8 and stored.startswith("float"):
        raise DataError(
            "predict: the run was trained on floats, and got uint8: scale inputs like the "
            "training data, and pass them as float32"
        )
