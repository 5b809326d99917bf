"""The paper's cost model against hand calculation, a longest path and its own limits."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipar_jax.errors import PlanError
from pipar_jax.tuner.recurrence import (
    MicroTimes,
    StepTimes,
    measured_step_s,
    paper_choice,
    paper_micro_batches,
    paper_step_s,
)

TIMES = StepTimes(2.0, 4.0, 1.0, 3.0, 6.0, 2.0)
seconds = st.floats(0.001, 10.0)
step_times = st.builds(StepTimes, *[seconds] * 6)


def test_one_micro_batch_takes_the_sum_of_all_parts() -> None:
    assert paper_step_s(TIMES, 1) == pytest.approx(sum(TIMES))


def test_two_micro_batches_by_hand() -> None:
    # CF 1, 2; U 4, 7; SB 6, 9; D 7, 10; CB 9, 12.
    assert paper_step_s(TIMES, 2) == pytest.approx(12.0)


def test_many_micro_batches_approach_the_slowest_resource() -> None:
    uplink_bound = StepTimes(0.1, 0.1, 0.1, 0.1, 5.0, 0.1)
    assert paper_step_s(uplink_bound, 1000) == pytest.approx(5.0, rel=1e-2)


@pytest.mark.parametrize(
    ("times", "batch_size", "expected"),
    [
        (TIMES, 100, math.ceil((6 + 1 + 3 + 2) / 2) + 1),
        (TIMES, 5, 5),  # the formula says 7
        (TIMES._replace(up_s=0, down_s=0, server_forward_s=0, server_backward_s=0), 100, 1),
        (TIMES._replace(device_forward_s=0.0), 100, 100),  # the formula divides by zero
        (StepTimes(1, 1, 0, 0, 3, 0), 4, 4),
        (StepTimes(1, 1, 0, 0, 3, 0), 5, 4),
    ],
)
def test_the_formula_for_n_is_clamped_to_the_batch(
    times: StepTimes, batch_size: int, expected: int
) -> None:
    assert paper_micro_batches(times, batch_size) == expected


@given(step_times, st.integers(1, 12))
def test_the_recurrence_is_the_longest_path(times: StepTimes, count: int) -> None:
    """Every resource works in index order; the device does its backwards after all forwards."""
    cf, cb, sf, sb, u, d = (value / count for value in times)
    resources = [[("F", i) for i in range(count)] + [("B", i) for i in range(count)]]
    resources += [[(kind, i) for i in range(count)] for kind in "USD"]
    before: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for resource in resources:
        for one, other in itertools.pairwise(resource):
            before.setdefault(other, []).append(one)
    for i in range(count):
        for one, other in itertools.pairwise("FUSDB"):
            before.setdefault((other, i), []).append((one, i))
    cost = {"F": cf, "U": u, "S": sf + sb, "D": d, "B": cb}
    end: dict[tuple[str, int], float] = {}

    def finish(node: tuple[str, int]) -> float:
        if node not in end:
            end[node] = max(map(finish, before.get(node, [])), default=0.0) + cost[node[0]]
        return end[node]

    assert paper_step_s(times, count) == pytest.approx(finish(("B", count - 1)), rel=1e-9)


@given(step_times, st.integers(1, 30))
def test_a_step_lies_between_its_slowest_resource_and_the_sum(times: StepTimes, count: int) -> None:
    step_s = paper_step_s(times, count)
    cf, cb, sf, sb, u, d = times
    assert max(cf + cb, sf + sb, u, d) <= step_s * (1 + 1e-9)
    assert step_s <= sum(times) * (1 + 1e-9)


def test_uneven_micro_batches_and_updates_by_hand() -> None:
    times = MicroTimes([1, 1], [2, 4], [3, 1], [1, 1], [2, 1], 0.5, 9.0)
    # CF 1, 2; U 3, 7; S 6, 8; D 7, 9; CB 9, 10: the server's update ends last.
    assert measured_step_s(times) == pytest.approx(17.0)
    assert measured_step_s(times._replace(server_update_s=0.0)) == pytest.approx(10.5)


def test_parts_of_different_lengths_are_refused() -> None:
    with pytest.raises(PlanError, match="up_s 1"):
        measured_step_s(MicroTimes([1, 1], [2], [3, 1], [1, 1], [2, 1]))
    with pytest.raises(PlanError, match="at least one"):
        measured_step_s(MicroTimes([], [], [], [], []))
    with pytest.raises(PlanError, match="micro-batch"):
        paper_step_s(TIMES, 0)
    with pytest.raises(PlanError, match="batch_size=0"):
        paper_micro_batches(TIMES, 0)


def test_the_choice_is_the_best_of_one_n_per_cut() -> None:
    candidates = {
        1: StepTimes(1, 1, 2, 2, 8, 8),
        2: StepTimes(2, 3, 1, 2, 2, 2),
        3: StepTimes(6, 9, 1, 1, 1, 1),
    }
    choice = paper_choice(candidates, 100)
    each = {
        cut: paper_step_s(times, paper_micro_batches(times, 100))
        for cut, times in candidates.items()
    }
    assert choice.cut == min(each, key=lambda cut: each[cut]) == 2
    assert choice.step_s == each[2]
    assert choice.micro_batches == paper_micro_batches(candidates[2], 100)
    with pytest.raises(PlanError, match="one unit"):
        paper_choice({}, 100)
