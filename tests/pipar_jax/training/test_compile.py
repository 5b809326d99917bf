"""What counts when a function is timed alone."""

from __future__ import annotations

import itertools

import pytest

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.training import compile, optimizer
from pipar_jax.training.replica import Replica
from tests.pipar_jax.runtime import support


@pytest.fixture
def pages(monkeypatch):
    """Lets each run of a function be given some pages by the kernel, from a list."""

    def install(given: list[int]):
        seconds = iter([0.01 + 0.001 * pages for pages in given])
        # What is asked before a run, and what after it.
        total = iter([sum(given[: (i + 1) // 2]) for i in range(2 * len(given))])
        monkeypatch.setattr(compile, "page_faults", lambda: next(total))
        return lambda: next(seconds)

    return install


def test_runs_in_which_memory_grew_do_not_count(pages):
    run = pages([200, 150, 10, 70, 0, 0, 0])
    assert compile.time_runs(run, 4, 0.0) == [0.02, 0.01, 0.01, 0.01]


def test_a_process_that_always_faults_is_timed_all_the_same(pages):
    run = pages([100] * (compile.LEFT_OUT + 3))
    assert len(compile.time_runs(run, 3, 0.0)) == 3


def test_little_time_is_left_out(pages):
    run = pages(list(itertools.repeat(300, 10)))
    found = compile.time_runs(run, 2, 0.0)
    assert len(found) == 2  # after two of 0.31 s


def test_a_single_run_only_compiles(pages):
    run = pages([5000, 0])
    assert compile.time_runs(run, 1, 0.0) == [5.01]


def test_compiling_and_timing_tell_how_far_they_are():
    """Every function counts once, at each size; the end is what was said to be there."""
    model = support.model(dtype="float32")
    params, state = model.init(0)
    made = optimizer.compiled(OptimizerConfig(), steps=1)
    replicas = [Replica(stage, params, state, made) for stage in stages.split(model, (1,))]
    count = (2 + 1) * 2 + 2  # forward and backward, the fused last stage, at two sizes; updates
    for function in (compile.compile_all, compile.run_all):
        told = []
        function(model, replicas, (1, 2), told=lambda *one, told=told: told.append(one))
        assert told == [(done, count) for done in range(1, count + 1)]


def test_a_word_now_and_then(monkeypatch):
    now = iter([0.0, 0.5, 1.25, 1.25, 1.5, 3.0, 3.0])
    monkeypatch.setattr(compile.time, "monotonic", lambda: next(now))
    heard = []
    told = compile.now_and_then(lambda *one: heard.append(one), 1.0)
    for done in range(1, 5):
        told(done, 4)
    assert heard == [(2, 4), (4, 4)]
