"""Units take turns when they are timed: every function of every unit, whatever else is alike."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.profiling import turn_times
from pipar_jax.profiling.turn_times import groups, time_in_turns
from pipar_jax.training import optimizer
from pipar_jax.training.replica import Replica
from tests.pipar_jax.runtime import support

SIZES = (2, 5)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(turn_times, "LEAST_S", 0.0)


def nothing(*_: object) -> None:
    """Neither aborts nor reports."""


def replicas_of(model, indices) -> dict[int, Replica]:
    compiled = optimizer.compiled(OptimizerConfig(), steps=1, proximal_mu=0.0)
    parts, variables = stages.split(model, tuple(range(1, len(model.units)))), model.init(0)
    return {index: Replica(parts[index], *variables, compiled) for index in indices}


@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.soak)])
def test_every_unit_has_times_of_every_size_and_keeps_its_weights(name):
    model = support.model(name, dtype="float32")
    count, compiled = len(model.units), []
    replicas = replicas_of(model, range(count))
    before = jax.tree.map(np.array, {i: one.params for i, one in replicas.items()})
    found = time_in_turns(model, replicas, range(count), SIZES, nothing, compiled.append)
    assert sorted(compiled) == list(range(count))
    assert found.call_s > 0
    for index in range(count):
        last = index == count - 1
        assert all((seconds == 0) == last for seconds in found.forward_s[index])
        assert len(found.forward_s[index]) == len(found.backward_s[index]) == len(SIZES)
        assert min(found.backward_s[index]) > 0 and found.update_s[index] > 0
    jax.tree.map(
        np.testing.assert_array_equal, before, {i: one.params for i, one in replicas.items()}
    )


def test_what_a_rest_adds_is_found_for_each_kind_and_never_less_than_nothing(monkeypatch):
    model, clock = support.model(dtype="float32"), {"rested": False}
    count = len(model.units)
    per_run = {True: 3.0, False: 1.0}

    def timed(function):
        results = jax.block_until_ready(function())
        rested, clock["rested"] = clock["rested"], False
        return turn_times.TimedRun(per_run[rested], grew=False), results

    def sleep(seconds: float) -> None:
        assert seconds == turn_times.REST_S
        clock["rested"] = True

    monkeypatch.setattr(turn_times, "timed", timed)
    monkeypatch.setattr(turn_times.time, "sleep", sleep)
    replicas = replicas_of(model, range(count))
    found = time_in_turns(model, replicas, range(count), SIZES, nothing)
    assert found.forward_s[0] == (1.0, 1.0)  # none of these had rested
    expected = {i: (2.0, 2.0, 2.0) for i in range(count)} | {count - 1: (0.0, 2.0, 2.0)}
    assert found.after_rest_s == expected
    per_run[True] = 0.5
    found = time_in_turns(model, replicas, range(count), SIZES, nothing)
    assert set(found.after_rest_s.values()) == {(0.0, 0.0, 0.0)}
    assert not time_in_turns(
        model, replicas, range(count), SIZES, nothing, rests=False
    ).after_rest_s


def test_units_whose_neighbours_are_left_out_have_inputs_all_the_same():
    def wide(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, 6, rngs=rngs)

    def narrow(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(6, 8, rngs=rngs)

    units = [("a", wide), ("b", narrow), ("c", wide), ("d", narrow), ("e", wide), ("f", narrow)]
    model = stages.Model.from_units("repeated", units, (8,), 8)
    alike = (0, 1, 2, 1, 2, 5)  # the first and the last are called in ways of their own
    found = time_in_turns(model, replicas_of(model, {0, 1, 2, 5}), alike, SIZES, nothing)
    assert set(found.update_s) == {0, 1, 2, 5}
    later = time_in_turns(model, replicas_of(model, {2, 5}), alike, SIZES, nothing)
    assert set(later.update_s) == {2, 5}


def test_units_in_a_group_hold_no_more_than_is_needed_and_not_much_less(monkeypatch):
    monkeypatch.setattr(turn_times, "HELD_BYTES", 10.0)
    assert groups({0: 3.0, 2: 4.0, 3: 5.0, 7: 6.0}) == [[0, 2], [3], [7]]
    assert groups({0: 3.0, 1: 4.0, 2: 5.0, 3: 5.0, 4: 1.0}) == [[0, 1], [2, 3, 4]]
    assert groups({0: 30.0, 1: 30.0}) == [[0], [1]]
    assert groups({0: 1.0}) == [[0]]


def test_timing_ends_when_nobody_wants_it_any_more():
    model = support.model(dtype="float32")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_in_turns(model, replicas_of(model, {0, 1}), range(len(model.units)), SIZES, stop)
