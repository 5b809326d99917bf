"""One host's share of a plan."""

from __future__ import annotations

import pytest

from pipar_jax.errors import PlanError
from pipar_jax.runtime.link_table import Wiring, dialler, direct
from pipar_jax.runtime.share import Share
from pipar_jax.schedule.actions import ALL, Action
from pipar_jax.schedule.plan import Boundary, DevicePlan, Plan

TWO = DevicePlan((2,), ("device", "server"), 3)


class Link:
    """As much of a link as an outlet looks at."""

    def __init__(self, available_bytes: int) -> None:
        self.available_bytes = available_bytes

    def can_send(self, nbytes: int) -> bool:
        return nbytes <= self.available_bytes


def share(plan: Plan, host: str = "server", **links: Link) -> Share:
    wiring = Wiring(host)
    wiring.control.update(links)  # type: ignore[arg-type]
    return Share(plan, host, wiring, [8, 16, 4, 40])


def test_a_host_meets_the_sizes_of_full_and_ragged_mini_batches():
    found = share(Plan((TWO, TWO))).sizes((20, 23), 10)
    assert found == {4, 3, 1}  # 10 as 4, 3, 3; the ragged 3 as 1, 1, 1
    assert share(Plan((TWO, TWO)), "d0").sizes((20, 23), 10) == {4, 3}


def test_results_leave_by_the_link_of_the_next_host():
    made = share(Plan((TWO, TWO)), "d1", server=Link(100))
    forward = made.outlet(Action(0, "F", 1, 0), 5)
    assert forward is not None and forward[1] == 20
    assert made.outlet(Action(0, "B", 1, 0), 5) is None
    assert made.outlet(Action(0, "U", 1, 0), 0) is None


def test_what_is_promised_counts_against_the_credit():
    made = share(Plan((TWO,)), "d0", server=Link(30))
    outlet, nbytes = made.outlet(Action(0, "F", 0, 0), 5) or pytest.fail("no outlet")
    assert outlet.can_send(nbytes)
    outlet.promised += nbytes
    assert not outlet.can_send(nbytes)
    assert outlet.can_send(10)


def test_weights_are_the_devices_own_or_the_one_copy():
    copies = share(Plan((TWO, TWO)))
    assert copies.slot(1, 1) == (1, 1)
    one = share(Plan((TWO, TWO), order="sequential", weights="shared"))
    assert one.slot(1, 1) == (ALL, 1)
    assert one.slot(1, 0) == (1, 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((DevicePlan((), ("device",)),), weights="shared"), "no stage serves all devices"),
        (Plan((TWO, DevicePlan((1,), ("device", "server"))), weights="shared"), "no stage serves"),
        (Plan((DevicePlan((1,), ("device", "cloud")),)), "device 0 has stages on cloud"),
        (Plan((DevicePlan((1,), ("n1", "n2")),)), "the first stage must be there too"),
        (Plan((DevicePlan((1, 2), ("device", "server", "device")),)), "meets server twice"),
        (Plan((DevicePlan((1,), ("device", "d1")), TWO)), "device 0 has stages on d1"),
    ],
)
def test_a_plan_that_nobody_could_carry_out_is_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        share(plan)


U_SHAPE = DevicePlan((1, 2), ("device", "n1", "device"), 4)


def test_two_boundaries_between_two_hosts_have_credit_of_their_own():
    """Activations that fill one link must not keep cotangents from the other."""
    plan, wiring = Plan((U_SHAPE,)), Wiring("d0")
    first, second = plan.boundaries()
    assert (first, second) == (Boundary("d0", "n1", 0), Boundary("n1", "d0", 1))
    assert [dialler(one) for one in direct(plan.boundaries())] == ["d0", "d0"]
    assert wiring.missing(plan.boundaries()) == [first, second]
    wiring.add(first, Link(0))  # type: ignore[arg-type]
    wiring.add(second, Link(100))  # type: ignore[arg-type]
    made = Share(plan, "d0", wiring, [8, 16, 4, 40])
    activation, nbytes = made.outlet(Action(0, "F", 0, 0), 5) or pytest.fail("no outlet")
    assert not activation.can_send(nbytes)
    cotangent, nbytes = made.outlet(Action(2, "L", 0, 0), 5) or pytest.fail("no outlet")
    assert cotangent.can_send(nbytes)


def test_a_cap_holds_forwards_back_and_nothing_else():
    plan = Plan((U_SHAPE, U_SHAPE), weights="shared", in_flight=1)
    wiring = Wiring("n1")
    for boundary in plan.boundaries():
        wiring.add(boundary, Link(100))  # type: ignore[arg-type]
    made = Share(plan, "n1", wiring, [8, 16, 4, 40])
    gate = made.gate(Action(1, "F", 1, 0))
    assert gate is not None and gate is made.gate(Action(1, "B", 0, 0))
    forward, nbytes = made.asked(Action(1, "F", 0, 0), 5) or pytest.fail("no outlet")
    assert forward.can_send(nbytes)
    gate.inside += 1
    assert not forward.can_send(nbytes)
    backward, nbytes = made.asked(Action(1, "B", 0, 0), 5) or pytest.fail("no outlet")
    assert backward.can_send(nbytes)
    assert made.slot(0, 1) == made.slot(1, 1) == (ALL, 1)
    assert plan.local_stages("n1") == (1,)
