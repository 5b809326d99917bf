"""Actions, spans and the partial order of a round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import (
    ALL,
    KINDS,
    MICRO,
    Action,
    Span,
    batch_samples,
    micro_batch_sizes,
    parse,
)
from pipar_jax.schedule.rounds import rounds
from tests.pipar_jax.schedule.rounds import PLANS, plan, schedule


@given(
    st.integers(0, 9),
    st.sampled_from(sorted(KINDS)),
    st.one_of(st.just(ALL), st.integers(0, 999)),
    st.integers(0, 10**6),
    st.integers(0, 99),
)
def test_an_action_prints_and_parses_back(stage, kind, device, step, micro_batch):
    action = Action(stage, kind, device, step, micro_batch if kind in MICRO else 0)
    assert parse(str(action)) == action


def test_the_text_of_an_action_is_the_documented_one():
    assert str(Action(2, "F", 1, 17, 0)) == "d1.2F0@17"
    assert str(Action(1, "U", ALL, 3)) == "d*.1U@3"


@pytest.mark.parametrize("text", ["", "d1.2F@17", "d1.2U0@3", "d1.2X0@1", "1.2F0@1", "d1.2F0@"])
def test_a_text_that_is_no_action_is_refused(text):
    with pytest.raises(PlanError, match="is not an action"):
        parse(text)


@given(st.integers(1, 500), st.integers(1, 600))
def test_micro_batches_differ_by_at_most_one_and_cover_the_mini_batch(samples, wanted):
    sizes = micro_batch_sizes(samples, wanted)
    assert sum(sizes) == samples
    assert len(sizes) == min(samples, wanted)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(1, 300), st.integers(1, 100))
def test_an_epoch_of_mini_batches_is_the_shard(samples, batch):
    steps = -(-samples // batch)
    for epoch in range(2):
        found = [batch_samples(samples, batch, epoch * steps + i) for i in range(steps)]
        assert sum(found) == samples
        assert all(n == batch for n in found[:-1])


def test_rounds_of_an_epoch_take_each_devices_own_steps():
    assert rounds(plan(), (3, 5), 2) == (
        (Span(0, 0, 3), Span(1, 0, 5)),
        (Span(0, 3, 6), Span(1, 5, 10)),
    )


def test_rounds_of_steps_are_the_same_for_all_and_the_last_may_be_short():
    found = rounds(plan(aggregate_every=2), (3, 5), 1)
    assert [(s.first, s.stop) for spans in found for s in spans if s.device == 0] == [
        (0, 2), (2, 4), (4, 5),
    ]  # fmt: skip
    assert all(a[1:] == b[1:] for a, b in found)


def test_sequential_rounds_hand_on_each_step_until_the_shards_are_exhausted():
    (spans,) = rounds(plan(order="sequential", weights="shared", hand_on="step"), (1, 3), 1)
    assert spans == (Span(0, 0, 1), Span(1, 0, 1), Span(1, 1, 2), Span(1, 2, 3))


@pytest.mark.parametrize("one", PLANS, ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_a_round_is_a_partial_order_in_which_every_action_occurs_once(one, index):
    made = schedule(one, index=index)
    rows = [row for step in made.steps() for row in step] + list(made.closing())
    actions = [action for action, _ in rows]
    assert len(actions) == len(set(actions))
    done: set[Action] = set()
    known = set(actions)
    for action, before in rows:
        # What a round waits for lies in it, or is the device part that an earlier one left.
        assert all(b in done for b in before if b in known), (action, before)
        done.add(action)
