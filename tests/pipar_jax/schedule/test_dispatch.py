"""The dispatcher, its policies, and the feeder that keeps it supplied."""

from __future__ import annotations

import pytest

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import RECEIVES, Action, host_of
from pipar_jax.schedule.dispatch import (
    DISPATCHED,
    CreditedLink,
    Demand,
    Dispatcher,
    InFlightLimit,
)
from pipar_jax.schedule.host_program import HostProgram
from pipar_jax.schedule.plan import Dispatch
from pipar_jax.schedule.policies import POLICIES, policy
from tests.pipar_jax.schedule.rounds import PLANS, schedule


@pytest.mark.parametrize("one", PLANS, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_finishes_every_schedule(one, name):
    """Hosts take turns; a send is delivered at once. No order may wait for something for ever."""
    made = schedule(one)
    hosts = {h: Dispatcher(policy(name, {0: 2.0})) for h in one.hosts()}
    rows = [row for step in made.steps() for row in step]
    waiting: dict[Action, list[Action]] = {}
    for action, before in rows:
        if action.kind in DISPATCHED:
            hosts[host_of(one, action)].add([(action, before, None)])
        for b in before:
            waiting.setdefault(b, []).append(action)
    before_of = dict(rows)
    over: set[Action] = set()

    def finish(action: Action) -> None:
        over.add(action)
        for dispatcher in hosts.values():
            dispatcher.complete(action)
        for after in waiting.get(action, ()):
            if after.kind not in DISPATCHED and all(
                b in over or b not in before_of for b in before_of[after]
            ):
                finish(after)

    for action, before in rows:
        if action.kind in RECEIVES and not before:
            finish(action)
    progress = True
    while progress:
        progress = False
        for dispatcher in hosts.values():
            action = dispatcher.next()
            if action is not None:
                progress = True
                finish(action)
    assert over >= {action for action, _ in rows}


class Shaped:
    """As much of a link as credit needs."""

    def __init__(self, available_bytes: float) -> None:
        self.available_bytes = available_bytes

    def can_send(self, nbytes: float) -> bool:
        return nbytes <= self.available_bytes


def test_an_action_without_credit_waits_and_does_not_hold_up_the_others():
    link = Shaped(0)
    dispatcher = Dispatcher(policy("fcfs"))
    blocked, other = Action(0, "F", 0, 0, 0), Action(0, "F", 1, 0, 0)
    dispatcher.add([(blocked, (), Demand(CreditedLink(link), 8, None)), (other, (), None)])
    assert dispatcher.next() == other
    assert dispatcher.next() is None
    link.available_bytes = 8
    assert dispatcher.next() == blocked
    assert not dispatcher.waiting()


def test_what_is_computed_for_a_link_is_reserved_until_it_is_handed_over():
    demand = Demand(CreditedLink(Shaped(30)), 20, None)
    dispatcher = Dispatcher(policy("fcfs"))
    first, second = Action(0, "F", 0, 0, 0), Action(0, "F", 0, 0, 1)
    dispatcher.add([(first, (), demand), (second, (), demand)])
    assert dispatcher.next() == first
    assert dispatcher.next() is None
    dispatcher.finish(first)
    assert dispatcher.next() == second


def test_a_limit_holds_forwards_back_and_nothing_else():
    limit = InFlightLimit(1)
    dispatcher = Dispatcher(policy("fcfs"))
    forwards = [Action(1, "F", 0, 0, m) for m in range(2)]
    backward = Action(1, "B", 0, 0, 0)
    dispatcher.add([(one, (), Demand(None, 0, limit)) for one in forwards])
    assert dispatcher.next() == forwards[0]
    dispatcher.finish(forwards[0])
    assert dispatcher.next() is None  # it is in flight until its backward has ended
    dispatcher.add([(backward, (), Demand(None, 0, limit))])
    assert dispatcher.next() == backward
    assert dispatcher.next() is None
    dispatcher.finish(backward)
    assert dispatcher.next() == forwards[1]


def test_what_is_over_before_it_is_waited_for_counts():
    dispatcher = Dispatcher(policy("fcfs"))
    arrived, wanted = Action(1, "RF", 0, 4, 0), Action(1, "L", 0, 4, 0)
    dispatcher.complete(arrived)
    dispatcher.add([(wanted, (arrived,), None)])
    assert dispatcher.next() == wanted


def test_plans_name_just_the_policies_that_are_registered():
    assert set(Dispatch) == set(POLICIES)


def test_policies_order_as_they_say():
    early, late = Action(0, "F", 0, 0, 1), Action(0, "B", 1, 0, 0)
    for name, first in {"fcfs": early, "backward_first": late, "slowest_first": late}.items():
        dispatcher = Dispatcher(policy(name, {0: 1.0, 1: 5.0}))
        dispatcher.add([(early, (), None), (late, (), None)])
        assert dispatcher.next() == first, name
    with pytest.raises(PlanError, match="not a dispatch policy"):
        policy("random")  # type: ignore[arg-type]


@pytest.mark.parametrize("one", PLANS, ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_a_hosts_program_is_its_part_of_the_schedule(one, index):
    """Same actions, same order, same predecessors as the whole round's."""
    made = schedule(one, index=index)
    for host in one.hosts():
        program = HostProgram(one, host)
        for position, span in enumerate(made.spans):
            for step in range(span.first, span.stop):
                whole = [
                    (action, before)
                    for action, before in made.step(position, step)
                    if action.kind in DISPATCHED and host_of(one, action) == host
                ]
                found = (
                    program.step(made, position, step) if program.takes_part(span.device) else []
                )
                assert found == whole
