"""To which step all go back where gradients are summed, and who cannot be right about it."""

from __future__ import annotations

import itertools
import random

import pytest

from pipar_jax.protocol.messages import Halted
from pipar_jax.roles.going_back import common_step
from pipar_jax.schedule.actions import ALL, COMPUTE, UPDATE, Span
from pipar_jax.schedule.keep import keep
from pipar_jax.schedule.plan import DevicePlan, Plan, WeightPolicy
from pipar_jax.schedule.rounds import RoundSchedule

#: Chains over which gradients are summed: two hosts, nodes, and labels at home.
CHAINS = {
    "server": ((1,), ("device", "server")),
    "nodes": ((1, 2, 3), ("device", "n1", "n2", "server")),
    "home": ((1, 2), ("device", "n1", "device")),
    "two nodes, home": ((1, 2, 3), ("device", "n1", "n2", "device")),
}
DEVICES, STEPS = 3, 5
#: Numbers that a field takes and that no host comes to.
EXTREME = (0, 2**31 - 1)


def plan_of(chain):
    cuts, hosts = CHAINS[chain]
    device = DevicePlan(cuts, hosts, 2)
    return Plan((device,) * DEVICES, weights=WeightPolicy.SHARED)


def some_moment(plan, rng, count):
    """The next step of each copy, by (copy, stage), after so many of a round's computations.

    They are carried out in any order that their predecessors allow, some devices more slowly.
    """
    spans = tuple(Span(device, 0, STEPS) for device in range(DEVICES))
    before: dict = {}
    for step in RoundSchedule(plan, spans, (12,) * DEVICES, 6).steps():
        for action, earlier in step:
            before.setdefault(action, set()).update(earlier)
    missing = {action: len(earlier) for action, earlier in before.items()}
    after: dict = {}
    for action, earlier in before.items():
        for one in earlier:
            after.setdefault(one, []).append(action)
    ready = [action for action, number in missing.items() if not number]
    slow = rng.randrange(DEVICES)
    copies = {
        (ALL if plan.is_shared(device, stage) else device, stage): 0
        for device in range(DEVICES)
        for stage in range(plan.devices[0].stages)
    }
    for _ in range(count):
        fast = [one for one in ready if not (one.device == slow and one.kind in COMPUTE)]
        action = rng.choice(fast if fast and rng.random() < 0.9 else ready)
        ready.remove(action)
        if action.kind == UPDATE:
            copies[action.device, action.stage] = action.step + 1
        for one in after.get(action, ()):
            missing[one] -= 1
            if not missing[one]:
                ready.append(one)
        if not ready:
            break
    return copies


def said_by(plan, copies):
    """What each host says of its copies at a moment."""
    found: dict = {"server": []}
    for (copy, stage), step in copies.items():
        host = plan.host(max(copy, 0), stage)
        kept = keep(plan, copy, keeps_state=True).wholes
        found.setdefault(host, []).append((max(step - kept, 0), step))
    return {
        host: Halted(0, min(step for _, step in some), max(least for least, _ in some))
        if some
        else Halted(0, STEPS, 0)
        for host, some in found.items()
    }


def moments(plan):
    """Some moments of a round: the steps of its copies, and what the hosts say."""
    rng = random.Random(str(plan))
    most = 0
    for _ in range(400):
        copies = some_moment(plan, rng, rng.randrange(400))
        most = max(most, max(copies.values()) - min(copies.values()))
        yield copies, said_by(plan, copies)
    # A fast device is ahead of what devices share while a slow one is behind it.
    assert most == 2


@pytest.mark.parametrize("chain", CHAINS)
def test_all_can_go_back_to_one_step_at_any_moment(chain):
    plan = plan_of(chain)
    for copies, said in moments(plan):
        step, odd = common_step(said, range(STEPS))
        assert not odd
        assert step == min(copies.values())
        for (copy, _), own in copies.items():
            assert own - step <= keep(plan, copy, keeps_state=True).wholes


@pytest.mark.sampled(4, 3)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_device_that_lies_takes_nobody_with_it(chain):
    """Whatever it says: it is out, or all the others can go where it says."""
    plan = plan_of(chain)
    for copies, said in moments(plan):
        others = {key: own for key, own in copies.items() if key[0] != 0}
        lies = itertools.product((*range(STEPS + 2), *EXTREME), repeat=2)
        for step, least in lies:
            back, odd = common_step({**said, "d0": Halted(0, step, least)}, range(STEPS))
            assert set(odd) <= {"d0"}, (copies, step, least)
            assert all(
                own - keep(plan, copy, keeps_state=True).wholes <= back <= own
                for (copy, _), own in others.items()
            ), (copies, step, least)


def test_a_node_that_lies_takes_nobody_with_it_where_the_server_has_a_stage():
    plan = plan_of("nodes")
    for copies, said in moments(plan):
        for step, least in itertools.product((*range(STEPS + 2), *EXTREME), repeat=2):
            back, odd = common_step({**said, "n1": Halted(0, step, least)}, range(STEPS))
            assert "server" not in odd
            server = next(own for (copy, stage), own in copies.items() if stage == 3)
            assert server - 1 <= back <= server


def test_of_nodes_that_contradict_each_other_those_are_right_that_most_agree_with():
    said = {
        "server": Halted(0, STEPS, 0),  # without a stage
        "n1": Halted(0, 3, 2),
        "n2": Halted(0, 3, 2),
        "n3": Halted(0, 0, 0),
        "d0": Halted(0, 3, 1),
        "d1": Halted(0, 0, 0),
    }
    step, odd = common_step(said, range(STEPS))
    assert step == 3 and set(odd) == {"n3", "d1"}


def test_what_was_not_finite_is_taken_back_although_all_have_taken_the_step():
    said = {"server": Halted(0, 3, 2), "d0": Halted(0, 3, 1), "d1": Halted(0, 4, 2)}
    assert common_step(said, range(STEPS)) == (3, {})
    assert common_step(said, range(STEPS), broken=2) == (2, {})
    # Whoever says so of a step to which nobody can go back is wrong, and out in any case.
    assert common_step(said, range(STEPS), broken=0) == (2, {})
    assert common_step(said, range(STEPS), broken=4) == (3, {})


def test_nobody_goes_back_beyond_what_was_released_last():
    """As when another device is lost while all are back at a step and have begun nothing."""
    back = Halted(0, 2, 1)
    assert common_step({"server": back, "d0": back}, range(2, 2)) == (2, {})
    _, odd = common_step({"server": back, "d0": Halted(0, 1, 0)}, range(2, 2))
    assert set(odd) == {"d0"}
