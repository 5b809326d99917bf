"""What a run shows of hosts and links, and the patience with which plans are changed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pipar_jax.protocol.values import Seen
from pipar_jax.schedule.plan import Boundary, Plan
from pipar_jax.simulator.predict import HostTimes, StageCosts, estimate
from pipar_jax.tuner.bounds import DeviceOption
from pipar_jax.tuner.drift import OVERHEAD_S, LinkThroughput, ProfileTracker, differ
from pipar_jax.tuner.replanning import LOOKS, REST, Choice, Offer
from tests.pipar_jax.tuner import profiles


def plan(cut: int, n: int = 4) -> Plan:
    return Plan((DeviceOption(cut, n).device_plan(),))


# --- watch ------------------------------------------------------------------------------------


def seen(profile, chain: Plan, stage: int, host, factor: float) -> list[Seen]:
    """What computations of a stage last on a host that is so many times slower than profiled."""
    units = chain.units(0, stage, len(profile.units))
    kinds = ("F", "B", "U") if stage == 0 else ("L", "U")
    times = HostTimes(host)
    return [
        Seen(0, stage, kind, size, 3, factor * times.time_s(kind, units.start, units.stop, size))
        for kind in kinds
        for size in ((0,) if kind == "U" else (25,))
    ]


def slow_profile():
    """Hosts whose computations take far longer than what a run adds to them."""
    made = profiles.profile(profiles.device(slower=1e7))
    return dataclasses.replace(made, server=made.server.slowed(1e7))


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0, 20.0])
def test_a_host_that_became_slower_is_so_in_the_profile(factor):
    base, chain = slow_profile(), plan(2)
    watch = ProfileTracker(base)
    watch.computed("d0", chain, seen(base, chain, 0, base.devices[0].host, factor))
    now = watch.profile()
    assert now.devices[0].host.forward_s[0][0] == pytest.approx(
        factor * base.devices[0].host.forward_s[0][0]
    )
    assert now.server == base.server
    watch.computed("server", chain, seen(base, chain, 1, base.server, factor))
    assert watch.profile().server.update_s[1] == pytest.approx(factor * base.server.update_s[1])


@pytest.mark.parametrize("times", [1, 2**31 - 1])
@pytest.mark.parametrize("median_s", [5e-324, 1e9])
def test_what_no_host_can_have_measured_leaves_the_profile_finite(median_s, times):
    base, chain = profiles.profile(profiles.device()), plan(2)
    tiny = tuple(tuple(5e-324 for _ in row) for row in base.devices[0].host.backward_s)
    for backward_s in (tiny, base.devices[0].host.backward_s):
        host = dataclasses.replace(base.devices[0].host, backward_s=backward_s)
        device = dataclasses.replace(base.devices[0], host=host)
        watch = ProfileTracker(dataclasses.replace(base, devices=(device,)))
        watch.computed("d0", chain, [Seen(0, 0, "B", 25, times, median_s)])
        assert all(math.isfinite(one) for one in watch.state())
        assert math.isfinite(estimate(StageCosts(watch.profile()), chain).epoch_s)


def test_what_a_run_adds_to_each_computation_slows_no_host_down():
    """A stage of 0.08 ms that takes 1.1 ms among threads says nothing of one of 20 ms."""
    base, chain = profiles.profile(profiles.device()), plan(4)
    watch = ProfileTracker(base)
    alone_s = HostTimes(base.server).time_s("L", 4, 5, 25)
    watch.computed("server", chain, [Seen(0, 1, "L", 25, 16, alone_s + 0.001)])
    assert watch.profile() == base
    watch.computed("server", chain, [Seen(0, 1, "L", 25, 16, alone_s + 0.02)])
    grown = watch.profile().server.update_s[0] / base.server.update_s[0]
    assert grown == pytest.approx((alone_s + 0.02 - OVERHEAD_S) / alone_s)
    watch.computed("server", chain, [Seen(0, 1, "L", 25, 16, alone_s)])
    assert watch.profile().server.update_s[0] == pytest.approx(base.server.update_s[0])


def test_a_host_that_rests_between_computations_has_not_become_slower():
    base, chain = profiles.profile(profiles.device()), plan(4)
    rested = dataclasses.replace(base.server, after_rest_s=((0.1, 0.2, 0.3),) * 5)
    base = dataclasses.replace(base, server=rested)
    alone_s = HostTimes(rested).time_s("L", 4, 5, 25)
    for added_s, grown in ((0.0, 1.0), (0.3, 1.0), (0.5, 1 + (0.2 - OVERHEAD_S) / alone_s)):
        watch = ProfileTracker(base)
        watch.computed("server", chain, [Seen(0, 1, "L", 25, 16, alone_s + added_s)])
        now_s = watch.profile().server.update_s[0]
        assert now_s / rested.update_s[0] == pytest.approx(grown)


def test_little_noise_is_averaged_and_nothing_seen_changes_nothing():
    base, chain = slow_profile(), plan(2)
    watch = ProfileTracker(base)
    watch.computed("d0", chain, [])
    assert watch.profile() == base
    for factor, expected in ((1.2, 1.1), (1.0, 1.05)):
        watch.computed("d0", chain, seen(base, chain, 0, base.devices[0].host, factor))
        made = watch.profile().devices[0].host.update_s[0] / base.devices[0].host.update_s[0]
        assert made == pytest.approx(expected)


LINK = Boundary("d1", "server", 0)


def test_a_rate_is_what_passed_between_two_looks():
    base = profiles.profile(profiles.device("50/50"), profiles.device("50/50"))
    watch = ProfileTracker(base)
    state = watch.state()
    watch.carried(
        LINK, "server", LinkThroughput(5e6, 0.8)
    )  # the first only says where counting begins
    assert watch.state() == state
    watch.carried(LINK, "server", LinkThroughput(5e6 + 1000, 0.9))  # too little to tell
    assert watch.state() == state
    watch.carried(LINK, "server", LinkThroughput(5e6 + 2.5e6, 0.8 + 2.0))
    now = watch.profile()
    assert now.devices[1].up.rate_bytes_s == pytest.approx(1.25e6)
    assert now.devices[1].up.delay_s == base.devices[1].up.delay_s
    assert (now.devices[0], now.devices[1].down) == (base.devices[0], base.devices[1].down)
    assert differ(state, watch.state(), 0.5)
    assert not differ(state, watch.state(), 0.9)


# --- choice -----------------------------------------------------------------------------------

OLD, NEW, OTHER = plan(1), plan(2), plan(3)


def look(choice: Choice, best: float, index: int = 0, of: Plan = NEW, **values) -> Plan | None:
    values = {"wanted_s": None, "moving_s": 0.0, "epochs_left": 10.0} | values
    return choice.look(index, Offer(choice.plan, 10.0), Offer(of, best), **values)


def test_a_small_win_has_to_be_seen_twice_in_a_row():
    choice = Choice(OLD, 0.1)
    assert look(choice, 8.5) is None
    assert look(choice, 9.5) is None  # less than the gain: counting starts again
    assert look(choice, 8.5) is None
    assert look(choice, 8.5) == NEW
    assert LOOKS == 2


def test_a_large_win_is_believed_at_once():
    assert look(Choice(OLD, 0.1), 6.9) == NEW
    assert look(Choice(OLD, 0.2), 6.9) is None


def test_two_plans_that_are_almost_equal_do_not_take_turns():
    choice = Choice(OLD, 0.1)
    assert look(choice, 6.0) == NEW
    assert look(choice, 5.95, of=OTHER, wanted_s=6.0) == NEW
    assert look(choice, 5.0, of=OTHER, wanted_s=6.0) == OTHER


def test_a_plan_that_no_longer_wins_is_not_wanted_any_more():
    choice = Choice(OLD, 0.1)
    assert look(choice, 6.0) == NEW
    assert look(choice, 9.9, wanted_s=9.9) is None
    assert choice.wanted is None
    assert look(choice, 10.0, of=OLD) is None


def test_after_a_change_some_rounds_have_to_pass():
    choice = Choice(OLD, 0.1)
    assert look(choice, 6.0, index=4) == NEW
    choice.changed(5)
    assert (choice.plan, choice.wanted) == (NEW, None)
    for index in range(5, 5 + REST - 1):
        assert look(choice, 5.0, index=index, of=OTHER) is None
    assert look(choice, 5.0, index=5 + REST - 1, of=OTHER) == OTHER


def test_a_change_has_to_pay_for_itself():
    choice = Choice(OLD, 0.1)
    assert look(choice, 6.0, moving_s=30.0, epochs_left=5.0) is None
    assert look(choice, 6.0, moving_s=19.0, epochs_left=5.0) == NEW
    assert look(Choice(OLD, 0.1), 6.0, epochs_left=0.0) is None


def test_a_plan_that_cannot_be_had_is_given_up():
    choice = Choice(OLD, 0.1)
    assert look(choice, 6.0) == NEW
    choice.give_up(OTHER)
    assert choice.wanted == NEW
    choice.give_up(NEW)
    assert choice.wanted is None
    assert look(choice, 6.0, of=OTHER) == OTHER
