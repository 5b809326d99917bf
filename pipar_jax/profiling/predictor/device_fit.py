"""What is known of one device, and how it is learned: from reference layers, then from stages.

A device is a scale s, an embedding z and, for each head, weights w of the network's last hidden
features: an operator lasts ``exp(g + s + h·z + w·φ)`` seconds. In a training there are a pace r on
top, since other work, or what a reference was taken with, makes all of it faster or slower, and a
correction c for each unit of the model, for what the network does not know of it. Little is known
at first, so all of them have a prior, that of s and z from the devices the network was trained on,
and what is measured is weighed against it: Gauss-Newton on the logarithm of sums over operators,
with Huber's weights, so that a hiccup of a machine is not believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipar_jax.profiling.predictor.latency_model import FACTORS, HIDDEN, Weights
from pipar_jax.profiling.predictor.operators import Array

#: How far the network is off on a layer of a device that it knows, in logarithms; and how far one
#: of two equal measurements is off the other.
DEVIATION = 0.12
#: How much a device's own weights may add to an operator's logarithm, before anything is seen.
OWN_DEVIATION = 0.35
#: How far the pace of a training is from that of measurements alone, in logarithms.
PACE_DEVIATION = 0.7
#: How far the network is off on a unit, on a device that it knows, in logarithms.
UNIT_DEVIATION = 0.4
#: Beyond so many deviations a measurement counts less and less.
HUBER = 1.5
STEPS = 25
#: Numbers that describe a device.
SIZE = 1 + FACTORS + 2 * HIDDEN
FORWARD_HEAD, BACKWARD_HEAD = 0, 1


#: A model's unit for each of some operators, [operators].
Units = npt.NDArray[np.int64]


class Observation(NamedTuple):
    """Seconds of some operators together.

    Attributes:
      forward: Operators whose forward was timed, [operators, WIDTH].
      backward: Operators whose backward was timed, [operators, WIDTH].
      seconds: How long all of it took.
      weight: How much it counts; 1 is a fresh measurement.
      units: If it was seen in a training, the model's unit that each operator belongs to: those of
        ``forward`` and those of ``backward``.
    """

    forward: Array
    backward: Array
    seconds: float
    weight: float = 1.0
    units: tuple[Units, Units] | None = None


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, as far as it is known.

    Attributes:
      weights: The shared network.
      values: The device's own numbers, [SIZE]: scale, embedding, forward's and backward's weights.
      training: Logarithms of the pace in training and of each unit's correction, [1 + units].
    """

    weights: Weights
    values: Array
    training: Array = dataclasses.field(default_factory=lambda: np.zeros(1))

    @property
    def pace(self) -> float:
        """How many times longer computations last in a training than alone, as far as was seen."""
        return float(np.exp(self.training[0]))

    def operator_s(self, table: Array, head: int) -> Array:
        """Returns the seconds of operators, [operators], in a head, at the pace of a training."""
        terms = _terms(self.weights, [table], head)
        seconds: Array = np.exp(terms.base + terms.design @ self.values) * self.pace
        return seconds

    def units_s(self, tables: Sequence[Array], head: int, first: int = 0) -> Array:
        """Returns the seconds of a model's units in training, as far as it was seen; [units].

        Args:
          tables: Each unit's operators, [operators, WIDTH].
          head: FORWARD_HEAD or BACKWARD_HEAD.
          first: The index of the first of them in the model.
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
    """Returns the device about which nothing is known."""
    values = np.zeros(SIZE)
    values[: 1 + FACTORS] = weights.mean
    return Device(weights, values)


def fit(
    weights: Weights,
    observations: Sequence[Observation],
    start: Device | None = None,
    units: int = 0,
) -> Device:
    """Returns the device that explains what was measured.

    Args:
      weights: The shared network.
      observations: What was measured; all of it, since nothing else is remembered.
      start: Where to start looking; the result depends on it little, the effort more.
      units: How many units the model in training has.
    """
    begin = typical(weights)
    if not observations:
        return begin
    forward = _terms(weights, [one.forward for one in observations], FORWARD_HEAD)
    backward = _terms(weights, [one.backward for one in observations], BACKWARD_HEAD)
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
    wanted = np.log([one.seconds for one in observations])
    trust = np.asarray([one.weight for one in observations]) / DEVIATION**2
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
    else:  # at least the scale, so that few steps suffice
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
      base: What the network alone says, [terms].
      design: By what each of a device's numbers is multiplied, [terms, SIZE], and those of a
        training.
      owner: The sum that each belongs to, [terms].
    """

    base: Array
    design: Array
    owner: npt.NDArray[np.int64]


def _terms(weights: Weights, tables: Sequence[Array], head: int) -> _Terms:
    """Returns all operators of all sums in one head."""
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
    """Returns by what pace and corrections are multiplied in a head, [terms, 1 + units]."""
    found = []
    for one in observations:
        rows = np.zeros((len((one.forward, one.backward)[part]), 1 + units))
        if one.units is not None:
            rows[:, 0] = 1.0
            rows[np.arange(len(rows)), 1 + one.units[part]] = 1.0
        found.append(rows)
    return np.concatenate(found)


def _sums(terms: _Terms, values: Array, count: int) -> tuple[Array, Array]:
    """Returns the logarithms of the sums, [count], and their slopes, [count, values]."""
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
