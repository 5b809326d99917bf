"""The parameters of one device, fitted to reference layers and then to stages.

A device is a scale s, an embedding z and, for each head, weights w of the network's last hidden
features: an operator takes ``exp(g + s + h·z + w·φ)`` seconds. Training adds a pace r, since other
work on the machine makes all operators faster or slower, and a correction c for each unit of the
model. All parameters have a prior, for s and z from the devices that the network was trained on.
The fit is Gauss-Newton on the logarithm of sums over operators, with Huber's weights, which make it
robust against outliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipar_jax.profiling.predictor.latency_model import FACTORS, HIDDEN, Weights
from pipar_jax.profiling.predictor.operators import Array

#: Standard deviation of the network's error on a layer of a known device, and of repeated
#: measurements, both of the logarithm.
DEVIATION = 0.12
#: Prior standard deviation of the contribution of a device's own weights to an operator's
#: logarithm.
OWN_DEVIATION = 0.35
#: Prior standard deviation of the logarithm of the pace of training.
PACE_DEVIATION = 0.7
#: Standard deviation of the network's error on a unit of a known device, of the logarithm.
UNIT_DEVIATION = 0.4
#: Number of deviations beyond which the weight of a measurement decreases.
HUBER = 1.5
STEPS = 25
#: Number of parameters of a device.
SIZE = 1 + FACTORS + 2 * HIDDEN
FORWARD_HEAD, BACKWARD_HEAD = 0, 1


#: The model's unit of each operator, [operators].
Units = npt.NDArray[np.int64]


class Observation(NamedTuple):
    """The total seconds of several operators.

    Attributes:
      forward: Operators whose forward was timed, [operators, WIDTH].
      backward: Operators whose backward was timed, [operators, WIDTH].
      seconds: Total duration.
      weight: Weight of the observation; 1 for a new measurement.
      units: If observed during training, the model's unit of each operator in ``forward`` and in
        ``backward``.
    """

    forward: Array
    backward: Array
    seconds: float
    weight: float = 1.0
    units: tuple[Units, Units] | None = None


@dataclasses.dataclass(frozen=True)
class Device:
    """The parameters of one device.

    Attributes:
      weights: The shared network.
      values: The device's parameters, [SIZE]: scale, embedding, weights of forward and backward.
      training: Logarithms of the pace in training and of each unit's correction, [1 + units].
    """

    weights: Weights
    values: Array
    training: Array = dataclasses.field(default_factory=lambda: np.zeros(1))

    @property
    def pace(self) -> float:
        """Estimated ratio of compute times in training to those of separate measurements."""
        return float(np.exp(self.training[0]))

    def operator_s(self, table: Array, head: int) -> Array:
        """Returns the seconds of operators, [operators], in a head, at the pace of a training."""
        terms = _terms(self.weights, [table], head)
        seconds: Array = np.exp(terms.base + terms.design @ self.values) * self.pace
        return seconds

    def units_s(self, tables: Sequence[Array], head: int, first: int = 0) -> Array:
        """Returns the seconds of a model's units in training, [units].

        Args:
          tables: Operators of each unit, [operators, WIDTH].
          head: FORWARD_HEAD or BACKWARD_HEAD.
          first: Index of the first unit in the model.
        """
        corrections = self.training[1 + first : 1 + first + len(tables)]
        factors = np.exp(corrections) if len(corrections) else 1.0
        seconds: Array = self.layers_s(tables, head) * factors
        return seconds

    def layers_s(self, tables: Sequence[Array], head: int) -> Array:
        """Returns the seconds of layers of any model.

        Args:
          tables: Each layer's operators, [operators, WIDTH].
          head: FORWARD_HEAD or BACKWARD_HEAD.

        Returns:
          [layers] float64.
        """
        if not tables:
            return np.zeros(0)
        each = self.operator_s(np.concatenate(tables), head)
        owner = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        return _grouped(owner, each, len(tables))


def typical(weights: Weights) -> Device:
    """Returns the prior of a device."""
    values = np.zeros(SIZE)
    values[: 1 + FACTORS] = weights.mean
    return Device(weights, values)


def fit(
    weights: Weights,
    observations: Sequence[Observation],
    start: Device | None = None,
    units: int = 0,
) -> Device:
    """Returns the device fitted to observations.

    Args:
      weights: The shared network.
      observations: All observations, including earlier ones.
      start: Starting point, which mainly affects the effort.
      units: Number of units of the model in training.
    """
    begin = typical(weights)
    if not observations:
        return begin
    forward = _terms(weights, [observation.forward for observation in observations], FORWARD_HEAD)
    backward = _terms(
        weights, [observation.backward for observation in observations], BACKWARD_HEAD
    )
    terms = _Terms(
        np.concatenate([forward.base, backward.base]),
        np.concatenate(
            [
                np.concatenate([head.design, _training(observations, part, units)], 1)
                for part, head in enumerate((forward, backward))
            ]
        ),
        np.concatenate([forward.owner, backward.owner]),
    )
    wanted = np.log([observation.seconds for observation in observations])
    trust = np.asarray([observation.weight for observation in observations]) / DEVIATION**2
    known = 1 + FACTORS
    precision = np.diag(
        np.concatenate(
            [
                np.zeros(known),
                np.full(SIZE - known, HIDDEN / OWN_DEVIATION**2),
                [1.0 / PACE_DEVIATION**2],
                np.full(units, 1.0 / UNIT_DEVIATION**2),
            ]
        )
    )
    precision[:known, :known] = weights.precision
    prior = np.concatenate([begin.values, np.zeros(1 + units)])
    values = prior.copy()
    if start is not None:
        values[:SIZE], values[SIZE : SIZE + len(start.training)] = start.values, start.training
    else:  # start from the scale, so that few steps suffice
        values[0] += np.median(wanted - _sums(terms, values, len(wanted))[0])
    for _ in range(STEPS):
        predicted, slope = _sums(terms, values, len(wanted))
        off = wanted - predicted
        huber = np.minimum(1.0, HUBER * DEVIATION / np.maximum(np.abs(off), 1e-12))
        weighted = slope * (trust * huber)[:, None]
        step = np.linalg.solve(
            slope.T @ weighted + precision,
            weighted.T @ off - precision @ (values - prior),
        )
        length = float(np.abs(step).max())
        values = values + step * min(1.0, 1.0 / max(length, 1e-12))
        if length < 1e-4:
            break
    return Device(weights, values[:SIZE], values[SIZE:])


class _Terms(NamedTuple):
    """Operators as terms of sums.

    Attributes:
      base: Output of the network alone, [terms].
      design: Coefficients of the device's parameters, [terms, SIZE], and of those of training.
      owner: The sum of each operator, [terms].
    """

    base: Array
    design: Array
    owner: npt.NDArray[np.int64]


def _terms(weights: Weights, tables: Sequence[Array], head: int) -> _Terms:
    """Returns the operators of all sums in one head."""
    counts = [len(table) for table in tables]
    owner = np.repeat(np.arange(len(tables)), counts)
    if not sum(counts):
        return _Terms(np.zeros(0), np.zeros((0, SIZE)), owner)
    basis = weights.basis(np.concatenate([table for table in tables if len(table)]))
    design = np.zeros((len(owner), SIZE))
    design[:, 0] = 1.0
    design[:, 1 : 1 + FACTORS] = basis.factors[head]
    first = 1 + FACTORS + head * HIDDEN
    design[:, first : first + HIDDEN] = basis.hidden
    return _Terms(basis.base[head], design, owner)


def _training(observations: Sequence[Observation], part: int, units: int) -> Array:
    """Returns the coefficients of pace and corrections in a head, [terms, 1 + units]."""
    found = []
    for observation in observations:
        rows = np.zeros((len((observation.forward, observation.backward)[part]), 1 + units))
        if observation.units is not None:
            rows[:, 0] = 1.0
            rows[np.arange(len(rows)), 1 + observation.units[part]] = 1.0
        found.append(rows)
    return np.concatenate(found)


def _sums(terms: _Terms, values: Array, count: int) -> tuple[Array, Array]:
    """Returns the logarithms of the sums, [count], and their derivatives, [count, values]."""
    each = np.exp(terms.base + terms.design @ values)
    total = _grouped(terms.owner, each, count)
    share = each / total[terms.owner]
    slope = np.zeros((count, len(values)))
    np.add.at(slope, terms.owner, share[:, None] * terms.design)
    return np.log(total), slope


def _grouped(owner: npt.NDArray[np.int64], values: Array, count: int) -> Array:
    """Returns the sums of values by owner, [count]."""
    found = np.zeros(count)
    np.add.at(found, owner, values)
    return found
