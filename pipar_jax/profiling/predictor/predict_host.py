"""Predicts the times of a model's units, as the profile of a host for the tuner."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import optax

from pipar_jax.cost_model.profile import HostProfile, UnitFacts
from pipar_jax.profiling.predictor.device_fit import BACKWARD_HEAD, FORWARD_HEAD, Device, fit
from pipar_jax.profiling.predictor.latency_model import Weights, load
from pipar_jax.profiling.predictor.operators import Array, Tables
from pipar_jax.profiling.predictor.reference import ReferenceTimes
from pipar_jax.runtime.memory import tree_bytes
from stages import Model, residual_bytes


def predict_host(
    model: Model,
    sizes: Sequence[int],
    reference: ReferenceTimes,
    *,
    device: Device | None = None,
    weights: Weights | None = None,
    tables: Tables | None = None,
) -> HostProfile:
    """Returns the predicted times of a model's units on a device with reference times.

    Args:
      model: The model.
      sizes: Micro-batch sizes, increasing.
      reference: The device's times of the reference layers.
      device: The current estimate of the device; None: fitted to these times.
      weights: The shared network; None is that of the package.
      tables: The model's operators, if known.
    """
    if device is None:
        device = fit(weights or load(), reference.observations())
    tables = tables or Tables(model)
    forward = np.stack([device.units_s(tables.at(size), FORWARD_HEAD) for size in sizes], 1)
    backward = np.stack([device.units_s(tables.at(size), BACKWARD_HEAD) for size in sizes], 1)
    # The last unit is one call: forward, loss and backward.
    backward[-1] = np.maximum(forward[-1] + backward[-1] - reference.call_s, backward[-1])
    forward[-1] = 0.0
    return HostProfile(
        tuple(sizes),
        tuple(map(tuple, forward.tolist())),
        tuple(map(tuple, backward.tolist())),
        _updates(model, reference),
        reference.call_s,
        reference.average_s_per_byte,
        handling=reference.handling,
    )


def facts_of(
    model: Model, transformation: optax.GradientTransformation, batch: int
) -> tuple[UnitFacts, ...]:
    """Returns the sizes of a model's units, without running anything.

    Args:
      model: The model.
      transformation: The optimiser of a replica.
      batch: Number of samples for the size of residuals.
    """
    kept = residual_bytes(model, batch)
    shapes = model.shapes(1)
    found = []
    for index, unit in enumerate(model.units):
        output = tree_bytes(shapes[index + 1])
        last = index == len(model.units) - 1
        found.append(
            UnitFacts(
                unit.name, tree_bytes(unit.params), tree_bytes(unit.state),
                tree_bytes(jax.eval_shape(transformation.init, unit.params)), output,
                tree_bytes(shapes[index]) + output if last else kept[index] / batch,
                unit.sides, unit.personal_bytes,
            )
        )  # fmt: skip
    return tuple(found)


def _updates(model: Model, reference: ReferenceTimes) -> tuple[float, ...]:
    """Returns the seconds of each unit's optimiser step: a call, plus a rate per byte."""
    sizes, seconds = np.asarray(reference.parameter_bytes), np.asarray(reference.update_s)
    wanted = np.asarray([tree_bytes(unit.params) for unit in model.units])
    # Interpolated between the reference layers, beyond the largest at its rate.
    order = np.argsort(sizes)
    knots, values = sizes[order], np.maximum.accumulate(seconds[order])
    found = np.interp(wanted, knots, values) * np.maximum(wanted / knots[-1], 1.0)
    return tuple(found.tolist())


def one_call(tables: Sequence[Array]) -> list[Array]:
    """Returns the operators of a stage's units with a single call, that of the first unit.

    Args:
      tables: Operators of each unit, [operators, WIDTH], its call first.
    """
    return [tables[0], *(table[1:] for table in tables[1:])]
