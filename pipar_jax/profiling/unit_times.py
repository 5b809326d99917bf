"""Measures forward, backward and update of every unit on a host, at several micro-batch sizes.

Runs in the process that will train, or in an equal one (``launch/local_profile.py``), since times
depend on its cores and environment. Measurements are cached by model, host and version, and reused
if one unit, measured again, has the same speed: processors are shared, throttled and replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import pipar_jax
import stages
from comms.codecs.base import parse_codec
from pipar_jax.aggregation import aggregator
from pipar_jax.config import AggregationConfig, Config, HostSpec, codec_candidates
from pipar_jax.config.slowdown import Slowdown
from pipar_jax.config.texts import whole_numbers
from pipar_jax.cost_model.profile import (
    NO_HANDLING,
    CodecProfile,
    HostProfile,
    UnitFacts,
    host_from_dict,
)
from pipar_jax.data.cache import user_cache
from pipar_jax.disk.files import make_folder, write_text
from pipar_jax.disk.json_text import JsonObject, dumps
from pipar_jax.errors import PlanError
from pipar_jax.profiling.predictor.predict_host import facts_of, predict_host
from pipar_jax.profiling.predictor.reference import ReferenceTimes, reference_model, time_reference
from pipar_jax.profiling.rehearsal import measure_handling
from pipar_jax.runtime.memory import tree_bytes
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE
from pipar_jax.training import optimizer
from pipar_jax.training.compile import Told, run_all
from pipar_jax.training.replica import Replica
from stages import Model, make_draw
from stages.trees import Variables

#: The measured fractions of a batch.
PARTS = (1, 4, 5, 10, 20)
#: Minimum number of runs of each function, and their minimum total duration in seconds.
REPEATS, LEAST_S = 5, 0.02
#: Cached times are valid if a unit's time has changed by less than this share, or these seconds.
AGED, AGED_S = 0.25, 1e-3
_FORMAT = 4
_CODEC_BYTES = 1 << 20

#: Measurements of a host: of a model's units, or of the reference layers.
Times = TypeVar("Times", HostProfile, ReferenceTimes)


class Measured(NamedTuple):
    """Measurements of a model on a host.

    Attributes:
      host: Times, without emulated slowdown.
      units: Sizes of the units.
      seconds: Duration of the measurement; 0 if it was cached.
    """

    host: HostProfile
    units: tuple[UnitFacts, ...]
    seconds: float

    def to_dict(self) -> JsonObject:
        """Returns values for JSON."""
        units = [dataclasses.asdict(unit) for unit in self.units]
        return {"host": dataclasses.asdict(self.host), "units": units, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: JsonObject) -> Measured:
        """Returns what ``to_dict`` wrote.

        Raises:
          PlanError: The values are not measurements.
        """
        try:
            units = tuple(UnitFacts(**one) for one in values["units"])
            return cls(host_from_dict(values["host"]), units, float(values["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"these are not a host's measurements: {error!r}") from error


def sizes_of(config: Config) -> tuple[int, ...]:
    """Returns the micro-batch sizes to measure: the given ones, or a batch and fractions of it.

    Compilers choose different loops for different sizes, so that times are not linear: 20 samples
    took a fifth less time than the interpolation between 5 and 25.
    """
    if config.tuner.sizes != "auto":
        return tuple(sorted(set(whole_numbers(config.tuner.sizes))))
    batch = config.data.batch_size
    return tuple(sorted({-(-batch // parts) for parts in PARTS}))


def measure_host(
    config: Config,
    model: Model,
    sizes: Sequence[int],
    between: Callable[[], None] = lambda: None,
    told: Told = lambda done, of: None,
) -> Measured:
    """Returns the times of a host, from its cache if possible.

    Args:
      config: Resolved configuration; model, optimiser, aggregation and ``tuner.cache`` are used.
      model: The whole model.
      sizes: Micro-batch sizes, increasing.
      between: Called between measurements; raises to abort them.
      told: Called with the number of measured units and their total number.
    """
    path = _cache_path(config, model, sizes) if config.tuner.cache else None
    if path is not None and path.is_file():
        try:
            known = Measured.from_dict(json.loads(path.read_text()))
            if _still_holds(config, model, known.host, between):
                return known._replace(seconds=0.0)
        except (PlanError, json.JSONDecodeError):
            path.unlink(missing_ok=True)  # truncated or edited: measure and write again
    began_s = time.monotonic()
    found = _measure(config, model, tuple(sizes), between, told)
    found = found._replace(seconds=time.monotonic() - began_s)
    if path is not None:
        write_measured(path, dumps(found.to_dict()))
    return found


def measure_reference(config: Config, between: Callable[[], None] = lambda: None) -> ReferenceTimes:
    """Returns the times of the reference layers, from which those of a model are predicted.

    Args:
      config: Resolved configuration; optimiser and aggregation are used.
      between: Called between measurements; raises to abort them.
    """
    found = time_reference(
        config.optimizer, proximal_mu=config.aggregation.proximal_mu, between=between
    )
    params, state = reference_model().init(config.seed)
    return dataclasses.replace(
        found,
        call_s=_call_s(),
        average_s_per_byte=_average_s_per_byte(config, params, state),
        handling=measure_handling(),
    )


def predicted_host(
    config: Config, model: Model, sizes: Sequence[int], reference: ReferenceTimes
) -> Measured:
    """Returns the predicted times of a model on a host, in the form of measurements.

    Args:
      config: Resolved configuration; the optimiser is used.
      model: The whole model.
      sizes: Micro-batch sizes, increasing.
      reference: The host's times of the reference layers.
    """
    began_s = time.monotonic()
    host = predict_host(model, sizes, reference)
    units = facts_of(model, _compiled(config).transformation, sizes[0])
    return Measured(host, units, time.monotonic() - began_s)


def measure_codecs(config: Config) -> dict[str, CodecProfile]:
    """Returns ratio and speed on this host of the codecs that a run may use.

    They are measured on signed numbers without zeros, the worst case.
    """
    rng = np.random.default_rng(0)
    array = rng.normal(size=(_CODEC_BYTES // 4,)).astype(np.float32)
    found = {}
    pipeline = config.pipeline
    configured = pipeline.activation_codec, pipeline.cotangent_codec, config.aggregation.codec
    for name in dict.fromkeys([*codec_candidates.names(config.tuner), *configured]):
        if name == "raw":
            continue
        codec, parameter = parse_codec(name)
        payload = codec.encode(array, parameter)
        encode_s = _least_s(functools.partial(codec.encode, array, parameter))
        decode_s = _least_s(
            functools.partial(codec.decode, payload, array.dtype, array.shape, parameter)
        )
        found[name] = CodecProfile(
            payload.nbytes / array.nbytes, encode_s / array.nbytes, decode_s / array.nbytes
        )
    return found


def as_configured(measured: HostProfile, host: HostSpec) -> HostProfile:
    """Returns the profile of a host with its emulated slowdown and memory limit."""
    made = emulated(measured, host.slowdown)
    return dataclasses.replace(made, memory_bytes=host.memory_bytes)


def emulated(times: Times, slowdown: Slowdown) -> Times:
    """Returns the measurements of a host with its emulated slowdown, if any."""
    if not slowdown.emulated:
        return times
    return dataclasses.replace(times.slowed(slowdown.at(0.0)), handling=NO_HANDLING)


def weight_ratio(config: AggregationConfig, codecs: Mapping[str, CodecProfile]) -> float:
    """Returns the bytes on the wire per byte of averaged weights."""
    name = config.codec
    return 1.0 if name == "raw" else codecs[name].ratio


class _Row(NamedTuple):
    """Measurements of one unit."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: float
    facts: UnitFacts


def _measure(
    config: Config, model: Model, sizes: tuple[int, ...], between: Callable[[], None], told: Told
) -> Measured:
    """Times every unit as a separate stage; equal units are timed only once."""
    params, state = model.init(config.seed)
    compiled = _compiled(config)
    known: dict[Any, _Row] = {}
    rows: list[_Row] = []
    for index, stage in enumerate(stages.split(model, tuple(range(1, len(model.units))))):
        likeness = _likeness(model, index)
        if likeness not in known:
            replica = Replica(stage, params, state, compiled)
            known[likeness] = time_unit(model, index, replica, sizes, between)
        row = known[likeness]
        facts = dataclasses.replace(row.facts, name=model.unit_names[index])
        rows.append(row._replace(facts=facts))
        told(len(rows), len(model.units))
    host = HostProfile(
        sizes,
        tuple(row.forward_s for row in rows),
        tuple(row.backward_s for row in rows),
        tuple(row.update_s for row in rows),
        _call_s(),
        _average_s_per_byte(config, params, state),
        handling=measure_handling(),
    )
    return Measured(host, tuple(row.facts for row in rows), 0.0)


def _still_holds(
    config: Config, model: Model, known: HostProfile, between: Callable[[], None]
) -> bool:
    """Times the longest unit again, at the largest size, and compares."""
    if len(known.forward_s) != len(model.units):
        return False
    totals = [
        forward[-1] + backward[-1]
        for forward, backward in zip(known.forward_s, known.backward_s, strict=True)
    ]
    index = max(range(len(totals)), key=totals.__getitem__)
    stage = stages.split(model, tuple(range(1, len(model.units))))[index]
    params, state = model.init(config.seed, only=stage.unit_names)
    replica = Replica(stage, params, state, _compiled(config))
    forward_s, backward_s, _ = _times_of(model, replica, known.sizes[-1:], between)
    now_s = forward_s[0] + backward_s[0]
    return abs(now_s - totals[index]) <= max(AGED * totals[index], AGED_S)


def _compiled(config: Config) -> optimizer.CompiledOptimizer:
    """Returns the optimiser of a run."""
    return optimizer.compiled(config.optimizer, steps=1, proximal_mu=config.aggregation.proximal_mu)


def _likeness(model: Model, index: int) -> Any:
    """Returns a key that is equal for units with equal computations, such as repeated blocks.

    The key consists of the module's static part and the shapes of its input and variables; the
    first and the last unit of a model have their own keys, since they are called differently.
    """
    unit = model.units[index]
    variables = sorted((path, str(leaf)) for path, leaf in (*unit.params.items(),
                                                            *unit.state.items()))  # fmt: skip
    place = index == 0, index == len(model.units) - 1
    return str(model.shapes(1)[index]), tuple(variables), unit.graph, place


def time_unit(
    model: Model,
    index: int,
    replica: Replica,
    sizes: tuple[int, ...],
    between: Callable[[], None],
) -> _Row:
    """Returns the times and sizes of one unit."""
    return _Row(*_times_of(model, replica, sizes, between), _facts(model, index, replica, sizes[0]))


def _times_of(
    model: Model, replica: Replica, sizes: Sequence[int], between: Callable[[], None]
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Returns seconds of forward and backward at each size, and of the update."""
    run_all(model, [replica], sizes, between=between)  # compiles
    times = {
        (shape.kind, shape.samples): seconds
        for shape, seconds in run_all(
            model, [replica], sizes, between=between, repeats=REPEATS, least_s=LEAST_S
        ).items()
    }
    kind = LOSS if replica.stage.is_last else BACKWARD
    return (
        tuple(times.get((FORWARD, size), 0.0) for size in sizes),
        tuple(times[kind, size] for size in sizes),
        times[UPDATE, 0],
    )


def _facts(model: Model, index: int, replica: Replica, samples: int) -> UnitFacts:
    """Returns the sizes of a unit; those of residuals are measured."""
    output_bytes = tree_bytes(model.shapes(1)[index + 1])
    if replica.stage.is_last:
        kept: float = tree_bytes(model.shapes(1)[index]) + output_bytes
    else:
        shape = model.shapes(samples)[index]
        draw = make_draw(samples)._replace(inverse_batch=np.float32(1.0 / samples))
        _, residuals = replica.forward(jnp.ones(shape.shape, shape.dtype), draw)
        kept = tree_bytes(residuals) / samples
    return UnitFacts(
        model.unit_names[index], tree_bytes(replica.params), tree_bytes(replica.state),
        tree_bytes(replica.opt_state), output_bytes, kept,
    )  # fmt: skip


def _average_s_per_byte(config: Config, params: Variables, state: Variables) -> float:
    """Returns the seconds of averaging two replicas, per byte of both."""
    made = aggregator.Aggregator(config.aggregation, dict(params), dict(state))
    replicas = [aggregator.Contribution(params, state, 1.0)] * 2
    made.aggregate(replicas)  # compiles
    return _least_s(lambda: made.aggregate(replicas)) / (2 * tree_bytes((params, state)))


def _call_s() -> float:
    """Returns the seconds of calling a trivial compiled function."""
    add, one = jax.jit(lambda x: x + 1), jnp.zeros(())
    add(one)

    def call() -> None:
        jax.block_until_ready(add(one))  # type: ignore[no-untyped-call]

    return _median_s(call, 100)


def _least_s(function: Callable[[], object]) -> float:
    """Returns the minimum of the seconds of several runs."""
    return min(_seconds(function) for _ in range(REPEATS))


def _median_s(function: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(function) for _ in range(repeats))


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cache_path(config: Config, model: Model, sizes: Sequence[int]) -> pathlib.Path:
    """Returns the cache file of this host, model and version."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    device = jax.devices()[0]
    about = {
        "format": _FORMAT,
        "versions": [pipar_jax.__version__, jax.__version__],
        "host": [platform.node(), platform.processor(), os.cpu_count(), cores],
        "device": [device.platform, device.device_kind],
        "model": [model.name, model.input_shape, model.classes, model.unit_names],
        "layers": dataclasses.asdict(config.model),
        "shapes": [str(shape) for shape in model.shapes(1)],
        "optimizer": dataclasses.asdict(config.optimizer),
        "aggregation": dataclasses.asdict(config.aggregation),
        "sizes": list(sizes),
    }
    mark = hashlib.sha256(dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / "profiles" / f"{model.name}-{mark}.json"


def write_measured(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically, since several hosts of a machine may write it at once."""
    remedy = "disable the cache with --config.tuner.cache=false"
    make_folder(path.parent, remedy)
    write_text(path, text, remedy)
