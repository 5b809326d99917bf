"""Compiles all shapes of a plan before the first round, and times functions separately."""

from __future__ import annotations

import functools
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, ActionKind
from pipar_jax.training.replica import Replica
from stages import MicroBatchContext, Model, Stage
from stages.lengths import variants
from stages.trees import PyTree

#: Minimum number of runs of each timed function.
REPEATS = 5
#: Minimum duration of timing a function, in seconds, long against interruptions by the scheduler,
#: which last milliseconds.
LEAST_S = 0.1
#: Runs with at least this many new pages are ignored: while its memory grows, a function may take a
#: multiple of its usual time.
PAGES = 64
#: Maximum number and duration of ignored runs, since some processes fault permanently.
LEFT_OUT, LEFT_OUT_S = 30, 0.5


#: Seconds between two reports of progress.
TOLD_S = 1.0
#: Called with the number of finished parts and their total number.
Told = Callable[[int, int], None]


def now_and_then(tell: Told, every_s: float) -> Told:
    """Returns a callback that forwards reports at most once per interval."""
    last_s = time.monotonic()

    def told(done: int, of: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= every_s:
            last_s = time.monotonic()
            tell(done, of)

    return told


def _silent(done: int, of: int) -> None:
    """Ignores reports."""


class Shape(NamedTuple):
    """One compiled case of a stage.

    Attributes:
      units: First and last unit of the stage.
      kind: F, B, L or U.
      samples: Samples in the micro-batch; 0 for an update.
      length: What they are padded to; None if all samples are equally long, and for an update.
    """

    units: tuple[str, str]
    kind: ActionKind
    samples: int
    length: int | None = None


def units_of(replica: Replica) -> tuple[str, str]:
    """Returns the first and the last unit of a replica's stage."""
    names = replica.stage.unit_names
    return names[0], names[-1]


def run_all(
    model: Model,
    replicas: Iterable[Replica],
    sizes: Iterable[int],
    *,
    between: Callable[[], None] = lambda: None,
    told: Told = _silent,
    repeats: int = 1,
    least_s: float = 0.0,
    summary: Callable[[list[float]], float] = statistics.median,
) -> Mapping[Shape, float]:
    """Runs every function of every distinct stage at every micro-batch size and length.

    The replicas are unchanged in the end. The first call compiles; later ones time the functions as
    in training: dispatched and awaited, with nothing else running.

    Args:
      model: The whole model.
      replicas: The host's replicas; equal stages are run once.
      sizes: Micro-batch sizes.
      between: Called between two stages; raises to abort.
      told: Called with the number of finished functions and their total number.
      repeats: Minimum number of runs of each function.
      least_s: Minimum duration of timing each function.
      summary: Reduces the seconds of a function to one number.

    Returns:
      The seconds of each function: their median, or the result of ``summary``.
    """
    found: dict[Shape, float] = {}
    distinct = {units_of(one): one for one in replicas}.values()
    wanted = sorted(set(sizes), reverse=True)
    forms = variants(model)
    count = _count(distinct, len(wanted) * len(forms))
    for replica in distinct:
        for variant, samples in itertools.product(forms, wanted):
            between()
            length = variant.input_shape[0] if model.lengths else None
            for kind, run in _functions(variant, replica, samples).items():
                found[Shape(units_of(replica), kind, samples, length)] = summary(
                    time_runs(run, repeats, least_s)
                )
                told(len(found), count)
        replica.clear()
        found[Shape(units_of(replica), UPDATE, 0)] = summary(
            time_runs(_update(replica), repeats, least_s)
        )
        told(len(found), count)
    return found


#: Runs a function once and returns its seconds.
_Run = Callable[[], float]


def time_runs(run: _Run, repeats: int, least_s: float) -> list[float]:
    """Returns the seconds of runs, without those in which memory grew if the growth ends."""
    times: list[float] = []
    left_out: list[float] = []
    while len(times) < repeats or sum(times) < least_s:
        before = page_faults()
        seconds = run()
        grew = repeats > 1 and page_faults() - before >= PAGES
        if grew and len(left_out) < LEFT_OUT and sum(left_out) < LEFT_OUT_S:
            left_out.append(seconds)
        else:
            times.append(seconds)
    return times


def page_faults() -> int:
    """Returns the number of page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Returns the seconds until a function's results are ready, and the results."""
    began = time.perf_counter()
    results = jax.block_until_ready(function(*args))  # type: ignore[no-untyped-call]
    return time.perf_counter() - began, results


def compile_all(
    model: Model,
    replicas: Iterable[Replica],
    sizes: Iterable[int],
    *,
    between: Callable[[], None] = lambda: None,
    told: Told = _silent,
) -> None:
    """Compiles every function of every distinct stage at every micro-batch size and length.

    Each runs once, except the optimiser's step, which donates all its arguments: copies of them may
    exceed the host's memory.

    Args:
      model: The whole model.
      replicas: The host's replicas.
      sizes: Micro-batch sizes.
      between: Called between two stages; raises to abort.
      told: Called with the number of compiled functions and their total number.
    """
    distinct = {units_of(one): one for one in replicas}.values()
    wanted = sorted(set(sizes), reverse=True)
    forms = variants(model)
    done, count = 0, _count(distinct, len(wanted) * len(forms))
    for replica in distinct:
        for variant, samples in itertools.product(forms, wanted):
            between()
            for run in _functions(variant, replica, samples).values():
                run()
                done += 1
                told(done, count)
        replica.clear()
        for lowered in replica.lower_updates():
            lowered.compile()
        done += 1
        told(done, count)


def _count(replicas: Collection[Replica], shapes: int) -> int:
    """Returns the number of functions: those of each shape, and the optimiser's steps."""
    return sum((1 if one.stage.is_last else 2) * shapes + 1 for one in replicas)


def _functions(model: Model, replica: Replica, samples: int) -> Mapping[ActionKind, _Run]:
    """Returns forward and backward, or the fused last stage, on ones instead of data."""
    stage, (first, last) = replica.stage, units_of(replica)
    shapes = model.shapes(samples)
    x = ones(shapes[model.unit_names.index(first)])
    sides = {name: ones(one) for name, one in stage.side_shapes(model, samples).items()}
    above = shapes[model.unit_names.index(last) + 1]
    draw = trial_draw(model, stage, samples)
    # Each run passes its accumulator to the next, which donates it: that of the replica, which the
    # next step overwrites. Steps of one micro-batch have none.
    held: dict[str, PyTree] = {}

    def run_last() -> float:
        targets = jax.tree.map(zeros, model.target_shapes(samples))
        seconds, results = _timed(
            functools.partial(stage.loss, counted=replica.count(samples)),
            replica.params, replica.state, x, targets, draw, replica.accumulated, sides,
        )  # fmt: skip
        replica.accumulated = None if replica.single else results[2]
        return seconds

    def run_forward() -> float:
        seconds, results = _timed(stage.forward, replica.params, replica.state, x, draw, sides)
        held["residuals"] = results[1]
        return seconds

    def run_backward() -> float:
        cotangent = ones(above)
        seconds, results = _timed(
            stage.backward, replica.params, held["residuals"], cotangent, replica.accumulated
        )
        replica.accumulated = None if replica.single else results[1]
        return seconds

    if stage.is_last:
        return {LOSS: run_last}
    return {FORWARD: run_forward, BACKWARD: run_backward}


def trial_draw(model: Model, stage: Stage, samples: int) -> MicroBatchContext:
    """Returns the scalars of a mini-batch of one micro-batch, of the dtypes that training has.

    With others a stage would be compiled a second time.

    Args:
      model: The whole model.
      stage: A stage of it.
      samples: Samples in the micro-batch.
    """
    above = model.shapes(samples)[model.unit_names.index(stage.unit_names[-1]) + 1]
    dtype = np.dtype(jnp.promote_types(above.dtype, jnp.float32))
    return stage.trial_draw(samples)._replace(inverse_batch=dtype.type(1.0 / samples))


def _update(replica: Replica) -> _Run:
    """Returns the optimiser's step on copies, which it donates."""
    copy = Replica.__new__(Replica)
    copy.__dict__.update(replica.__dict__)
    for name in ("params", "opt_state"):
        setattr(copy, name, jax.device_put(getattr(replica, name), may_alias=False))

    def run() -> float:
        copy.zero_gradient()
        jax.block_until_ready(copy.accumulated)  # type: ignore[no-untyped-call]
        return _timed(copy.update)[0]

    return run


def ones(shape: Any) -> jax.Array:
    """Returns ones of an abstract shape: processors may be faster with zeros than with data."""
    # From numpy, since jnp.ones is a program that would have to be compiled for each shape.
    return jax.block_until_ready(  # type: ignore[no-untyped-call, no-any-return]
        jax.device_put(np.ones(shape.shape, shape.dtype))
    )


def zeros(shape: Any) -> jax.Array:
    """Returns zeros of an abstract shape, on the device."""
    return jax.block_until_ready(  # type: ignore[no-untyped-call, no-any-return]
        jax.device_put(np.zeros(shape.shape, shape.dtype))
    )
