"""Baselines of the predictor: three simple estimates of a layer's time.

All have the same inputs: times of some layers on a device and, for the ratio, times of all layers
on one profiled device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipar_jax.profiling.predictor.operators import Array, features

Table = npt.NDArray[np.float64]


def scalar_ratio(seen_s: Table, seen_reference_s: Table, wanted_reference_s: Table) -> Table:
    """Returns a profiled device's times multiplied by the median ratio of the two devices.

    Args:
      seen_s: Seconds on the device, [layers seen].
      seen_reference_s: Seconds of the same layers on the profiled device.
      wanted_reference_s: Seconds of the wanted layers on the profiled device.
    """
    both = np.isfinite(seen_s) & np.isfinite(seen_reference_s)
    if not both.any():
        return np.full_like(wanted_reference_s, np.nan)
    ratio = np.exp(np.median(np.log(seen_s[both] / seen_reference_s[both])))
    scaled: Table = wanted_reference_s * ratio
    return scaled


def flops_regression(seen: Sequence[Array], seen_s: Table, wanted: Sequence[Array]) -> Table:
    """Returns a + b·FLOPs + c·bytes, fitted to relative errors, at least the minimum seen.

    Args:
      seen: Operators of the layers seen, each [operators, WIDTH].
      seen_s: Their seconds.
      wanted: Operators of the wanted layers.
    """
    known = np.isfinite(seen_s)
    x, y = _sizes([one for one, k in zip(seen, known, strict=True) if k]), seen_s[known]
    design = np.concatenate([np.ones((len(x), 1)), x], 1) / y[:, None]
    factors = _non_negative(design, np.ones(len(y)))
    rest = np.concatenate([np.ones((len(wanted), 1)), _sizes(wanted)], 1) @ factors
    found: Table = np.maximum(rest, y.min())
    return found


def look_up(seen: Sequence[Array], seen_s: Table, wanted: Sequence[Array]) -> Table:
    """Returns the time of the most similar layer seen, scaled by the ratio of their FLOPs.

    Args:
      seen: Operators of the layers seen.
      seen_s: Their seconds.
      wanted: Operators of the wanted layers.
    """
    known = np.isfinite(seen_s)
    table = [one for one, k in zip(seen, known, strict=True) if k]
    times = seen_s[known]
    ours, theirs = _summary(wanted), _summary(table)
    nearest = ((ours[:, None] - theirs[None]) ** 2).sum(-1).argmin(1)
    scale = _sizes(wanted)[:, 0] / np.maximum(_sizes(table)[nearest, 0], 1e-30)
    found: Table = times[nearest] * np.maximum(scale, 1e-6)
    return found


def _sizes(layers: Sequence[Array]) -> Table:
    """Returns FLOPs and bytes of layers in units of 1e9, [layers, 2]."""
    return np.stack([[layer[:, 1].sum(), layer[:, 2:5].sum()] for layer in layers]) / 1e9


def _summary(layers: Sequence[Array]) -> Table:
    """Returns the features of each layer's largest operator, [layers, FEATURES]."""
    return np.stack([features(layer[layer[:, 1].argmax()][None])[0] for layer in layers])


def _non_negative(design: Table, wanted: Table) -> Table:
    """Returns non-negative least-squares factors: negative ones are left out."""
    left = list(range(design.shape[1]))
    while True:
        found = np.linalg.lstsq(design[:, left], wanted, rcond=None)[0]
        if (found >= 0).all() or len(left) == 1:
            factors = np.zeros(design.shape[1])
            factors[left] = np.maximum(found, 0.0)
            return factors
        left.pop(int(found.argmin()))
