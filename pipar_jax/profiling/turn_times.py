"""Times the units of a model in turns, as a run computes them: forwards, loss, backwards, updates.

Between two computations of a unit a run computes all others, so that weights and residuals of a
small unit have to be fetched from memory. Timed repeatedly by itself, it would find them in the
processor's cache: stages of MobileNetV3-Small took up to twice the sum of such times. A host that
waits for its neighbours rests in between, and its caches are empty then: the same stages took
another third.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, ActionKind
from pipar_jax.training.compile import (
    LEFT_OUT,
    LEFT_OUT_S,
    PAGES,
    ones,
    page_faults,
    trial_draw,
    zeros,
)
from pipar_jax.training.replica import Replica
from stages import Model
from stages.trees import PyTree

#: Minimum number of runs of each function, and their minimum duration in seconds in the mean.
REPEATS, LEAST_S = 5, 0.02
#: Number of runs of each function with a rest before it, and without: what a rest adds is fetched
#: from memory, of which a few runs show enough.
RESTED_REPEATS = 3
#: Seconds of a rest, after which a virtual machine's processor had lost what it held; not more than
#: half of it after 2 ms.
REST_S = 0.01
#: Bytes that units which take turns may hold together, many times those of a cache: what is not
#: held does not limit a small device, and what is larger is fetched from memory anyhow.
HELD_BYTES = 256e6

#: A function: a unit, its kind, and the samples (0 for an update).
_Function = tuple[int, ActionKind, int]


class TimedRun(NamedTuple):
    """The seconds of a run, and whether memory grew, so that it may have taken a multiple."""

    seconds: float
    grew: bool


class TurnTimes(NamedTuple):
    """Seconds of units that took turns.

    Attributes:
      forward_s: By unit, a time for each size; zeros for the last unit of the model.
      backward_s: By unit, a time for each size; for the last unit the fused forward and backward.
      update_s: By unit.
      call_s: Of calling a trivial compiled function in between, once per unit.
      after_rest_s: By unit, what a rest adds to its forward, backward and update.
    """

    forward_s: Mapping[int, tuple[float, ...]]
    backward_s: Mapping[int, tuple[float, ...]]
    update_s: Mapping[int, float]
    call_s: float
    after_rest_s: Mapping[int, tuple[float, float, float]]


def groups(held_bytes: Mapping[int, float]) -> list[list[int]]:
    """Returns consecutive units in groups, none of which holds much less than HELD_BYTES.

    Args:
      held_bytes: Bytes of each unit: of its residuals, weights, gradient and optimiser state.
    """
    found: list[list[int]] = []
    total = 0.0
    for index in sorted(held_bytes):
        if not found or total + held_bytes[index] > HELD_BYTES:
            found.append([])
            total = 0.0
        found[-1].append(index)
        total += held_bytes[index]
    if len(found) > 1 and total < HELD_BYTES / 2:
        rest = found.pop()
        found[-1] += rest
    return found


def time_in_turns(
    model: Model,
    replicas: Mapping[int, Replica],
    alike: Sequence[int],
    sizes: Sequence[int],
    between: Callable[[], None],
    compiled: Callable[[int], None] = lambda index: None,
    *,
    rests: bool = True,
) -> TurnTimes:
    """Times units in turns at several micro-batch sizes, without those in which memory grew.

    Args:
      model: The whole model.
      replicas: The units to time, by index; their weights are not trained.
      alike: For each unit of the model the index of a unit with the same computations.
      sizes: Micro-batch sizes.
      between: Called between computations; raises to abort.
      compiled: Called with each unit once its functions are compiled for the largest size.
      rests: Whether to measure what a rest adds.
    """
    turns = _Turns(model, replicas, alike, between)
    for position, size in enumerate(sorted(sizes, reverse=True)):
        updates = position == 0
        for (index, kind, _), _ in turns.step(size, updates=updates):
            if updates and kind in (BACKWARD, LOSS):
                compiled(index)
        turns.time(size, updates=updates)
    # What was lost is fetched once, however many samples there are: the fewest show it best.
    after_rest_s = turns.time_rested(min(sizes)) if rests else {}
    return turns.found(sizes)._replace(after_rest_s=after_rest_s)


class _Turns:
    """The units that take turns, and the seconds of their functions so far."""

    def __init__(
        self,
        model: Model,
        replicas: Mapping[int, Replica],
        alike: Sequence[int],
        between: Callable[[], None],
    ) -> None:
        self._model, self._replicas, self._alike = model, dict(sorted(replicas.items())), alike
        self._between = between
        self._times: dict[_Function, list[float]] = {}
        self._left_out: dict[_Function, list[float]] = {}
        self._calls: list[float] = []
        self._add, self._zero = jax.jit(lambda x: x + 1), jnp.zeros(())

    def time(self, size: int, *, updates: bool) -> None:
        """Repeats steps of a size until each function has been timed often and long enough."""
        enough = False
        while not enough:
            counts, spent_s = [], 0.0
            for function, run in self.step(size, updates=updates):
                times = self._note(function, run)
                counts.append(len(times))
                spent_s += sum(times)
                self._calls.append(timed(lambda: self._add(self._zero))[0].seconds)
            enough = min(counts) >= REPEATS and spent_s >= LEAST_S * len(counts)

    def time_rested(self, size: int) -> dict[int, tuple[float, float, float]]:
        """Returns what a rest before them adds to the functions of each unit."""
        times: dict[tuple[int, ActionKind, bool], list[float]] = {}
        for repeat in range(2 * RESTED_REPEATS):
            rested = bool(repeat % 2)
            rest_s = REST_S if rested else 0.0
            for (index, kind, _), run in self.step(size, updates=True, rest_s=rest_s):
                times.setdefault((index, kind, rested), []).append(run.seconds)

        def added_s(index: int, *kinds: ActionKind) -> float:
            found = [kind for kind in kinds if (index, kind, True) in times]
            with_s, without_s = (
                sum(statistics.median(times[index, kind, rested]) for kind in found)
                for rested in (True, False)
            )
            return max(with_s - without_s, 0.0)

        return {
            index: (added_s(index, FORWARD), added_s(index, BACKWARD, LOSS), added_s(index, UPDATE))
            for index in self._replicas
        }

    def step(
        self, size: int, *, updates: bool, rest_s: float = 0.0
    ) -> Iterator[tuple[_Function, TimedRun]]:
        """Computes one step of a size, with rests; yields each function with its run."""

        def after_rest(function: Callable[[], Any]) -> tuple[TimedRun, Any]:
            if rest_s:
                time.sleep(rest_s)
            return timed(function)

        shapes, outputs, kept = self._model.shapes(size), dict[int, Any](), dict[int, Any]()
        parts = {index: replica.stage for index, replica in self._replicas.items()}
        draws = {index: trial_draw(self._model, stage, size) for index, stage in parts.items()}
        sides = {
            index: {n: ones(s) for n, s in stage.side_shapes(self._model, size).items()}
            for index, stage in parts.items()
        }
        given: dict[int, Any] = {}  # cotangents of inputs
        for index, replica in self._replicas.items():
            self._between()
            x = outputs.get(self._alike[index - 1]) if index else None
            x = ones(shapes[index]) if x is None else x
            if replica.stage.is_last:
                targets = jax.tree.map(zeros, self._model.target_shapes(size))
                run, (_, given[index]) = after_rest(
                    partial(replica.loss, x, targets, draws[index], sides[index])
                )
                yield (index, LOSS, size), run
                continue
            run, (outputs[index], kept[index]) = after_rest(
                partial(replica.forward, x, draws[index], sides[index])
            )
            yield (index, FORWARD, size), run
        for index in sorted(kept, reverse=True):
            self._between()
            cotangent = given.get(self._alike[index + 1])
            cotangent = ones(shapes[index + 1]) if cotangent is None else cotangent
            run, (given[index], _) = after_rest(
                partial(_backward, self._replicas[index], kept.pop(index), cotangent)
            )
            yield (index, BACKWARD, size), run
        if not updates:
            return
        for replica in self._replicas.values():  # all, so that none finds its own in the cache
            replica.zero_gradient()  # weights stay what they are
            jax.block_until_ready(replica.accumulated)  # type: ignore[no-untyped-call]
        for index, replica in self._replicas.items():
            yield (index, UPDATE, 0), after_rest(replica.update)[0]

    def found(self, sizes: Sequence[int]) -> TurnTimes:
        """Returns the medians."""
        medians = {function: statistics.median(times) for function, times in self._times.items()}
        last = {index: replica.stage.is_last for index, replica in self._replicas.items()}
        return TurnTimes(
            {i: tuple(medians.get((i, FORWARD, n), 0.0) for n in sizes) for i in last},
            {i: tuple(medians[i, LOSS if last[i] else BACKWARD, n] for n in sizes) for i in last},
            {i: medians[i, UPDATE, 0] for i in last},
            statistics.median(self._calls),
            {},
        )

    def _note(self, function: _Function, run: TimedRun) -> list[float]:
        """Adds a run of a function, if its memory does not grow; returns the function's seconds."""
        times = self._times.setdefault(function, [])
        left_out = self._left_out.setdefault(function, [])
        if run.grew and len(left_out) < LEFT_OUT and sum(left_out) < LEFT_OUT_S:
            left_out.append(run.seconds)
        else:
            times.append(run.seconds)
        return times


def _backward(replica: Replica, residuals: PyTree, cotangent: jax.Array) -> tuple[Any, Any]:
    """Returns the input's cotangent and the accumulated gradient, which are ready together."""
    return replica.backward(residuals, cotangent), replica.accumulated


def timed(function: Callable[[], Any]) -> tuple[TimedRun, Any]:
    """Returns a run of a function, until its results are ready, and the results."""
    pages, began_s = page_faults(), time.perf_counter()
    results = jax.block_until_ready(function())  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began_s
    return TimedRun(seconds, page_faults() - pages >= PAGES), results
