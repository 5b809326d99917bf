"""Measures forward, backward and update of every unit on a host, at several micro-batch sizes.

Units take turns, as in a run (``turn_times``). Runs in the process that will train, or in an equal
one (``launch/local_profile.py``), since times depend on its cores and environment. Measurements are
cached by model, host and version, and reused if one unit, measured again, has the same speed:
processors are shared, throttled and replaced.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import stages
from pipar_jax.aggregation import aggregator
from pipar_jax.config import AggregationConfig, Config, HostSpec, ModelConfig, OptimizerConfig
from pipar_jax.config.slowdown import Slowdown
from pipar_jax.config.texts import whole_numbers
from pipar_jax.cost_model.profile import (
    NO_HANDLING,
    HostProfile,
    UnitFacts,
)
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.profiling.kept_times import Measured, path_of_times, read_times, write_times
from pipar_jax.profiling.predictor.predict_host import facts_of, predict_host
from pipar_jax.profiling.predictor.reference import ReferenceTimes, reference_model, time_reference
from pipar_jax.profiling.rehearsal import measure_handling
from pipar_jax.profiling.stopwatch import median_s
from pipar_jax.profiling.turn_times import LEAST_S, REPEATS, REST_S, groups, time_in_turns
from pipar_jax.runtime.memory import tree_bytes
from pipar_jax.schedule.actions import UPDATE, micro_batch_sizes
from pipar_jax.training import optimizer
from pipar_jax.training.compile import Told, ones, run_all, trial_draw
from pipar_jax.training.replica import Replica
from stages import Model
from stages.trees import Variables

#: The measured fractions of a batch.
PARTS = (1, 4, 5, 10, 20)
#: Cached times are valid if a unit's time has changed by less than this share, or these seconds.
AGED, AGED_S = 0.25, 1e-3

#: Measurements of a host: of a model's units, or of the reference layers.
Times = TypeVar("Times", HostProfile, ReferenceTimes)


def sizes_of(sizes: str, batch: int, numbers: Collection[int] = ()) -> tuple[int, ...]:
    """Returns the micro-batch sizes to measure, increasing.

    Compilers choose different loops for different sizes, so that times are not linear: 20 samples
    took a fifth less time than the interpolation between 5 and 25.

    Args:
      sizes: ``tuner.sizes``: a list, or ``auto`` for a mini-batch and fractions of it.
      batch: Samples of a mini-batch.
      numbers: With ``auto`` the numbers of micro-batches that plans may have; none: any. Each
        size is compiled for every unit, so that no more are measured than these need.
    """
    if sizes != "auto":
        return tuple(sorted(set(whole_numbers(sizes))))
    needed = {size for number in numbers for size in micro_batch_sizes(batch, number)}
    if not 0 < len(needed) <= len(PARTS):
        needed = {-(-batch // parts) for parts in PARTS}
    return tuple(sorted(needed))


def measure_host(
    config: Config,
    model: Model,
    sizes: Sequence[int],
    between: Callable[[], None] = lambda: None,
    told: Told = lambda done, of: None,
    in_turns: bool = True,
) -> Measured:
    """Returns the times of a host, from its cache if possible.

    Args:
      config: Resolved configuration; model, optimiser, aggregation and ``tuner.cache`` are used.
      model: The whole model.
      sizes: Micro-batch sizes, increasing.
      between: Called between measurements; raises to abort them.
      told: Called with the number of measured units and their total number.
      in_turns: Whether units take turns, as in a run, or each is timed by itself: for a host with
        emulated slowness, which multiplies the times of stages by themselves.
    """
    timer = _UnitTimer(model, config.seed, _compiled(config.optimizer, config.aggregation), between)
    path = None
    if config.tuner.cache:
        sections: dict[str, ModelConfig | OptimizerConfig | AggregationConfig] = {
            "layers": config.model,
            "optimizer": config.optimizer,
            "aggregation": config.aggregation,
        }
        settings: dict[str, JsonObject] = {
            name: dataclasses.asdict(section) for name, section in sections.items()
        }
        settings["timing"] = {"in_turns": in_turns}
        path = path_of_times(model, sizes, settings)
        if (kept := read_times(path)) is not None and timer.confirms(kept):
            return kept._replace(seconds=0.0)
    began_s = time.monotonic()
    host, facts = timer.measure(tuple(sizes), told, in_turns)
    host = dataclasses.replace(
        host,
        average_s_per_byte=_average_s_per_byte(config.aggregation, timer.params, timer.state),
        handling=measure_handling(),
    )
    alone_s = timer.longest_alone_s(host)
    measured = Measured(host, tuple(facts), time.monotonic() - began_s, alone_s)
    if path is not None:
        write_times(path, measured)
    return measured


def measure_reference(
    config: OptimizerConfig,
    aggregation: AggregationConfig,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> ReferenceTimes:
    """Returns the times of the reference layers, from which those of a model are predicted.

    Args:
      config: The optimiser.
      aggregation: The rule of aggregation.
      seed: Of the reference layers' weights.
      between: Called between measurements; raises to abort them.
    """
    times = time_reference(config, proximal_mu=aggregation.proximal_mu, between=between)
    params, state = reference_model().init(seed)
    return dataclasses.replace(
        times,
        call_s=_call_s(),
        average_s_per_byte=_average_s_per_byte(aggregation, params, state),
        handling=measure_handling(),
    )


def predicted_host(
    config: Config, model: Model, sizes: Sequence[int], reference: ReferenceTimes
) -> Measured:
    """Returns the predicted times of a model on a host, in the form of measurements.

    Args:
      config: Resolved configuration; optimiser and aggregation are used.
      model: The whole model.
      sizes: Micro-batch sizes, increasing.
      reference: The host's times of the reference layers.
    """
    began_s = time.monotonic()
    host = predict_host(model, sizes, reference)
    units = facts_of(
        model, _compiled(config.optimizer, config.aggregation).transformation, sizes[0]
    )
    return Measured(host, units, time.monotonic() - began_s)


def as_configured(measured: HostProfile, host: HostSpec) -> HostProfile:
    """Returns the profile of a host with its emulated slowdown and memory limit."""
    made = emulated(measured, host.slowdown)
    return dataclasses.replace(made, memory_bytes=host.memory_bytes)


def emulated(times: Times, slowdown: Slowdown) -> Times:
    """Returns the measurements of a host with its emulated slowdown, if any."""
    if not slowdown.emulated:
        return times
    return dataclasses.replace(times.slowed(slowdown.at(0.0)), handling=NO_HANDLING)


class _UnitTimer:
    """Times the units of a model, each as a stage of its own.

    Args:
      model: The whole model.
      seed: Seed of its weights.
      compiled: The optimiser.
      between: Called between measurements; raises to abort them.

    Attributes:
      params: All weights.
      state: All statistics.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        compiled: optimizer.CompiledOptimizer,
        between: Callable[[], None],
    ) -> None:
        self._model, self._compiled, self._between = model, compiled, between
        self._stages = stages.split(model, tuple(range(1, len(model.units))))
        self.params, self.state = model.init(seed)

    def measure(
        self, sizes: tuple[int, ...], told: Told, in_turns: bool
    ) -> tuple[HostProfile, list[UnitFacts]]:
        """Times every unit, in turns with others or by itself; equal units are timed only once.

        Returns:
          A profile without averages and handling, and the sizes of units.
        """
        count = len(self._model.units)
        first: dict[Any, int] = {}
        alike = [first.setdefault(_likeness(self._model, i), i) for i in range(count)]
        facts: dict[int, UnitFacts] = {}
        for index in first.values():
            self._between()
            facts[index] = _facts(self._model, index, self._replica(index), sizes[0])
        held_bytes = {
            index: 2 * unit.parameter_bytes + unit.optimizer_bytes + unit.residual_bytes * sizes[-1]
            for index, unit in facts.items()
        }
        done: set[int] = set()

        def compiled(index: int) -> None:
            done.add(index)
            told(sum(other in done for other in alike), count)

        forward_s: dict[int, tuple[float, ...]] = {}
        backward_s: dict[int, tuple[float, ...]] = {}
        update_s: dict[int, float] = {}
        after_rest_s: dict[int, tuple[float, float, float]] = {}
        calls = []
        for group in groups(held_bytes) if in_turns else [[index] for index in held_bytes]:
            replicas = {index: self._replica(index) for index in group}
            times = time_in_turns(
                self._model, replicas, alike, sizes, self._between, compiled, rests=in_turns
            )
            forward_s |= times.forward_s
            backward_s |= times.backward_s
            update_s |= times.update_s
            after_rest_s |= times.after_rest_s
            calls.append(times.call_s)
        host = HostProfile(
            sizes,
            tuple(forward_s[index] for index in alike),
            tuple(backward_s[index] for index in alike),
            tuple(update_s[index] for index in alike),
            statistics.median(calls),
            after_rest_s=tuple(after_rest_s[index] for index in alike) if in_turns else (),
        )
        names = zip(alike, self._model.unit_names, strict=True)
        return host, [dataclasses.replace(facts[index], name=name) for index, name in names]

    def longest_alone_s(self, host: HostProfile) -> float:
        """Times the longest unit by itself, at the largest size, forward and backward."""
        totals = [
            forward[-1] + backward[-1]
            for forward, backward in zip(host.forward_s, host.backward_s, strict=True)
        ]
        replica = self._replica(max(range(len(totals)), key=totals.__getitem__))
        sizes = host.sizes[-1:]
        run_all(self._model, [replica], sizes, between=self._between)  # compiles
        times = run_all(
            self._model, [replica], sizes, between=self._between, repeats=REPEATS, least_s=LEAST_S
        )
        lengths = (None, self._model.input_shape[0]) if self._model.lengths else (None,)
        return sum(
            seconds
            for shape, seconds in times.items()
            if shape.kind != UPDATE and shape.length in lengths
        )

    def confirms(self, kept: Measured) -> bool:
        """Returns whether the longest unit by itself takes about as long as it did."""
        if len(kept.host.forward_s) != len(self._model.units):
            return False
        now_s = self.longest_alone_s(kept.host)
        return abs(now_s - kept.alone_s) <= max(AGED * kept.alone_s, AGED_S)

    def _replica(self, index: int) -> Replica:
        return Replica(self._stages[index], self.params, self.state, self._compiled)


def _compiled(
    config: OptimizerConfig, aggregation: AggregationConfig
) -> optimizer.CompiledOptimizer:
    """Returns the optimiser of a run."""
    return optimizer.compiled(
        config, steps=optimizer.MANY_STEPS, proximal_mu=aggregation.proximal_mu
    )


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


def _facts(model: Model, index: int, replica: Replica, samples: int) -> UnitFacts:
    """Returns the sizes of a unit; those of residuals are measured."""
    output_bytes = tree_bytes(model.shapes(1)[index + 1])
    if replica.stage.is_last:
        kept: float = tree_bytes(model.shapes(1)[index]) + output_bytes
    else:
        shape = model.shapes(samples)[index]
        draw = trial_draw(model, replica.stage, samples)
        sides = {name: ones(one) for name, one in replica.stage.side_shapes(model, samples).items()}
        _, residuals = replica.forward(ones(shape), draw, sides)
        kept = tree_bytes(residuals) / samples
    return UnitFacts(
        model.unit_names[index], tree_bytes(replica.params), tree_bytes(replica.state),
        tree_bytes(replica.opt_state), output_bytes, kept, model.units[index].sides,
        model.units[index].personal_bytes,
    )  # fmt: skip


def _average_s_per_byte(config: AggregationConfig, params: Variables, state: Variables) -> float:
    """Returns the seconds of averaging two replicas, per byte of both.

    As at the end of a round: a rest before, and replicas that have come over links.
    """
    made = aggregator.Aggregator(config, dict(params), dict(state))
    came, statistics_came = jax.tree.map(np.asarray, (dict(params), dict(state)))
    replicas = [aggregator.Contribution(came, statistics_came, 1.0)] * 2
    made.aggregate(replicas)  # compiles
    seconds = median_s(lambda: made.aggregate(replicas), REPEATS, REST_S)
    return seconds / (2 * tree_bytes((params, state)))


def _call_s() -> float:
    """Returns the seconds of calling a trivial compiled function."""
    add, zero = jax.jit(lambda x: x + 1), jnp.zeros(())
    add(zero)

    def call() -> None:
        jax.block_until_ready(add(zero))  # type: ignore[no-untyped-call]

    return median_s(call, 100)
