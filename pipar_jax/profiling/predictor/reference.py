"""The reference layers: eleven small layers whose times characterise a device.

They are the units of one chain, each of another kind or shape, to reveal what is fast and slow on a
device: wide and narrow convolutions, a depthwise one, elementwise work on a large map, pools,
matrix products bound by memory, and layers so small that only the call counts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.cost_model.profile import NO_HANDLING, RuntimeOverhead
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import PlanError
from pipar_jax.profiling.predictor.device_fit import Observation
from pipar_jax.profiling.predictor.operators import Array, model_operators, rows
from pipar_jax.schedule.actions import BACKWARD, FORWARD, UPDATE
from pipar_jax.training import optimizer
from pipar_jax.training.compile import run_all
from pipar_jax.training.replica import Replica
from stages import Model
from stages.layers import Conv, Dense, Flatten, make_norm, max_pool

#: Batch size of the reference layers.
BATCH = 16
#: Minimum number of runs of each function, and their minimum duration: in total less than two
#: seconds on a device with a twentieth of the speed of a server's core.
REPEATS, RUNS_S = 3, 0.015
#: Limits of a duration: what is beyond them no clock has shown, and logarithms of it spoil a fit.
LEAST_S, MOST_S = 1e-9, 1e9


class _Normalise(nnx.Module):
    """Normalisation and ReLU."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.norm = make_norm("batch", features, dtype=np.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(x))


class _Pool(nnx.Module):
    """Max-pools by two; the offset exists because a unit needs weights."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        del rngs  # nothing is drawn
        self.offset = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, 2) + self.offset[...]


class _FlatDense(nnx.Module):
    """A matrix product and ReLU."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.flatten, self.dense = Flatten(), Dense(inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.dense(self.flatten(x)))


@functools.cache
def reference_model() -> Model:
    """Returns the chain whose units, but for the last, are the reference layers."""

    def conv(inputs: int, outputs: int, size: int, **more: Any) -> Callable[[nnx.Rngs], nnx.Module]:
        return lambda rngs: Conv(inputs, outputs, size, rngs=rngs, **more)

    def dense(inputs: int, outputs: int) -> Callable[[nnx.Rngs], nnx.Module]:
        return lambda rngs: _FlatDense(inputs, outputs, rngs)

    units: list[tuple[str, Callable[[nnx.Rngs], nnx.Module]]] = [
        ("image", conv(3, 32, 3)),
        ("norm", functools.partial(_Normalise, 32)),
        ("pool", functools.partial(_Pool, 32)),
        ("conv3", conv(32, 64, 3)),
        ("conv1", conv(64, 128, 1)),
        ("depthwise", conv(128, 128, 3, stride=2, groups=128)),
        ("wide", conv(128, 128, 3)),
        ("stride", conv(128, 256, 3, stride=2)),
        ("small", conv(256, 256, 3)),
        ("dense", dense(4096, 256)),
        ("tiny", dense(256, 64)),
        ("last", dense(64, 10)),
    ]
    return Model.from_units("reference", units, (32, 32, 3), 10)


@dataclasses.dataclass(frozen=True)
class ReferenceTimes:
    """Measurements of a device.

    Attributes:
      forward_s: Seconds of the forward of each reference layer, without the last unit.
      backward_s: Seconds of the backward of each.
      update_s: Seconds of the run's optimiser step on each.
      parameter_bytes: Bytes of each layer's weights, by which updates are scaled.
      call_s: Seconds of calling an empty compiled function.
      average_s_per_byte: Seconds to average a byte of one device's weights.
      handling: Overhead of a run per computation, as in ``HostProfile``.
      seconds: Duration of the measurements, without compilation.
      prepared_s: Duration of compilation.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    parameter_bytes: tuple[float, ...]
    call_s: float = 0.0
    average_s_per_byte: float = 0.0
    handling: RuntimeOverhead = NO_HANDLING
    seconds: float = 0.0
    prepared_s: float = 0.0

    def to_dict(self) -> JsonObject:
        """Returns values for JSON."""
        return dataclasses.asdict(self)

    def slowed(self, factor: float) -> ReferenceTimes:
        """Returns the times multiplied by a factor."""
        return dataclasses.replace(
            self,
            forward_s=tuple(seconds * factor for seconds in self.forward_s),
            backward_s=tuple(seconds * factor for seconds in self.backward_s),
            update_s=tuple(seconds * factor for seconds in self.update_s),
            call_s=self.call_s * factor,
            average_s_per_byte=self.average_s_per_byte * factor,
        )

    def observations(self) -> list[Observation]:
        """Returns the times as observations for the fit."""
        found = []
        for table, forward_s, backward_s in zip(
            reference_layers(), self.forward_s, self.backward_s, strict=True
        ):
            found.append(Observation(table, table[:0], forward_s))
            found.append(Observation(table[:0], table, backward_s))
        return found

    @classmethod
    def from_dict(cls, values: JsonMapping) -> ReferenceTimes:
        """Returns what ``to_dict`` wrote.

        Raises:
          PlanError: The values are not such times.
        """
        lists = ("forward_s", "backward_s", "update_s", "parameter_bytes")
        try:
            handling = RuntimeOverhead(
                **{key: float(one) for key, one in values["handling"].items()}
            )
            made = cls(handling=handling, **{
                name: tuple(map(float, value)) if name in lists else float(value)
                for name, value in values.items()
                if name != "handling"
            })  # type: ignore[arg-type]  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"these are not the times of reference layers: {error!r}") from error
        count = len(reference_model().units) - 1
        if any(len(getattr(made, name)) != count for name in lists):
            raise PlanError(
                f"a device must report the times of {count} reference layers, got "
                f"{len(made.forward_s)}: do both hosts have the same version?"
            )
        if not all(LEAST_S <= one <= MOST_S for one in (*made.forward_s, *made.backward_s)):
            raise PlanError(
                f"the times of reference layers must be from {LEAST_S:g} to {MOST_S:g} s, got "
                f"{min(*made.forward_s, *made.backward_s):g} to "
                f"{max(*made.forward_s, *made.backward_s):g}"
            )
        if not all(nbytes >= 1 for nbytes in made.parameter_bytes):
            raise PlanError(
                "reference layers have weights of a byte at least, got "
                f"{min(made.parameter_bytes):g} bytes"
            )
        return made


@functools.cache
def reference_layers() -> tuple[Array, ...]:
    """Returns the operators of each reference layer, [operators, WIDTH]."""
    model = reference_model()
    found = model_operators(model, range(len(model.units) - 1), BATCH)
    return tuple(rows(operators) for operators in found)


def time_reference(
    config: OptimizerConfig,
    *,
    proximal_mu: float = 0.0,
    between: Callable[[], None] = lambda: None,
) -> ReferenceTimes:
    """Times the reference layers in this process.

    Args:
      config: The run's optimiser, whose steps are timed as well.
      proximal_mu: FedProx's weight, which affects the optimiser's step.
      between: Called between two layers; raises to abort the measurements.
    """
    model = reference_model()
    began_s = time.monotonic()
    params, state = model.init(0)
    compiled = optimizer.compiled(config, steps=optimizer.MANY_STEPS, proximal_mu=proximal_mu)
    parts = stages.split(model, tuple(range(1, len(model.units))))[:-1]
    replicas = [Replica(stage, params, state, compiled) for stage in parts]
    run_all(model, replicas, (BATCH,), between=between)  # compiles
    prepared_s = time.monotonic() - began_s
    found = run_all(model, replicas, (BATCH,), between=between, repeats=REPEATS, least_s=RUNS_S)
    times = {(shape.units[0], shape.kind): seconds for shape, seconds in found.items()}
    names = model.unit_names[:-1]
    return ReferenceTimes(
        forward_s=tuple(times[name, FORWARD] for name in names),
        backward_s=tuple(times[name, BACKWARD] for name in names),
        update_s=tuple(times[name, UPDATE] for name in names),
        parameter_bytes=tuple(
            float(sum(leaf.size * 4 for leaf in unit.params.values())) for unit in model.units[:-1]
        ),
        seconds=time.monotonic() - began_s - prepared_s,
        prepared_s=prepared_s,
    )
