"""One host's share of a plan."""

from __future__ import annotations

import pytest

from pipar_jax.errors import PlanError
from pipar_jax.plan import DevicePlan, Plan
from pipar_jax.runtime.share import Share
from pipar_jax.schedule import ALL, Action

TWO = DevicePlan((2,), ("device", "server"), 3)


class Link:
    """As much of a link as an outlet looks at."""

    def __init__(self, available_bytes: int) -> None:
        self.available_bytes = available_bytes

    def can_send(self, nbytes: int) -> bool:
        return nbytes <= self.available_bytes


def share(plan: Plan, host: str = "server", **links: Link) -> Share:
    return Share(plan, host, links, [8, 16, 4, 40])  # type: ignore[arg-type]


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
        (Plan((TWO,), weights="shared"), "needs plan.order='sequential'"),
        (Plan((DevicePlan((1,), ("device", "n1")),)), "device 0 has stages on n1"),
        (Plan((DevicePlan((1,), ("device", "d1")), TWO)), "device 0 has stages on d1"),
    ],
)
def test_a_plan_that_nobody_could_carry_out_is_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        share(plan)
