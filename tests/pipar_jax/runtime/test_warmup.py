"""What counts when a function is timed alone."""

from __future__ import annotations

import itertools

import pytest

from pipar_jax.runtime import warmup


@pytest.fixture
def pages(monkeypatch):
    """Lets each run of a function be given some pages by the kernel, from a list."""

    def install(given: list[int]):
        seconds = iter([0.01 + 0.001 * pages for pages in given])
        # What is asked before a run, and what after it.
        total = iter([sum(given[: (i + 1) // 2]) for i in range(2 * len(given))])
        monkeypatch.setattr(warmup, "_pages", lambda: next(total))
        return lambda: next(seconds)

    return install


def test_runs_in_which_memory_grew_do_not_count(pages):
    run = pages([200, 150, 10, 70, 0, 0, 0])
    assert warmup._times(run, 4, 0.0) == [0.02, 0.01, 0.01, 0.01]


def test_a_process_that_always_faults_is_timed_all_the_same(pages):
    run = pages([100] * (warmup.LEFT_OUT + 3))
    assert len(warmup._times(run, 3, 0.0)) == 3


def test_little_time_is_left_out(pages):
    run = pages(list(itertools.repeat(300, 10)))
    found = warmup._times(run, 2, 0.0)
    assert len(found) == 2  # after two of 0.31 s


def test_a_single_run_only_compiles(pages):
    run = pages([5000, 0])
    assert warmup._times(run, 1, 0.0) == [5.01]
