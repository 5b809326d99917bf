"""What a plan means for one host."""

from __future__ import annotations

import pytest

from pipar_jax.errors import PlanError
from pipar_jax.runtime.link_table import LinkTable, dialler, direct
from pipar_jax.schedule.actions import ALL
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.host_program import Beside, HostProgram, find_beside
from pipar_jax.schedule.plan import Boundary, Codecs, DevicePlan, Plan

TWO = DevicePlan((2,), ("device", "server"), 3)
U_SHAPE = DevicePlan((1, 2), ("device", "n1", "device"), 4)


def test_a_host_meets_the_sizes_of_full_and_ragged_mini_batches():
    found = HostProgram(Plan((TWO, TWO)), "server").sizes((20, 23), 10)
    assert found == {4, 3, 1}  # 10 as 4, 3, 3; the ragged 3 as 1, 1, 1
    assert HostProgram(Plan((TWO, TWO)), "d0").sizes((20, 23), 10) == {4, 3}


def test_results_leave_by_the_boundary_to_the_next_host():
    coded = DevicePlan((2,), ("device", "server"), 3, (Codecs("int8", "bfloat16"),))
    device = HostProgram(Plan((TWO, coded)), "d1")
    assert device.places == (1,) and device.takes_part(1) and not device.takes_part(0)
    forward = device.operation(1, 0, "F")
    assert forward.target == Boundary("d1", "server", 0)
    assert (forward.cut, forward.codec, forward.source, forward.output_of) == (
        2,
        "int8",
        None,
        None,
    )
    backward = device.operation(1, 0, "B")
    assert backward.target is None
    assert (backward.source, backward.received) == (Boundary("d1", "server", 0), "RB")
    loss = HostProgram(Plan((TWO, coded)), "server").operation(1, 1, "L")
    assert (loss.target, loss.codec, loss.cut) == (Boundary("d1", "server", 0), "bfloat16", 2)
    assert (loss.sent, loss.arrives_as, loss.target_stage) == ("SB", "RB", 0)
    assert device.is_first(1)
    assert device.operation(1, 0, "U").target is None
    with pytest.raises(KeyError):
        device.operation(1, 1, "L")


def test_what_two_stages_of_one_host_hand_each_other_stays_there():
    program = HostProgram(Plan((DevicePlan((1, 2), ("device", "device", "server"), 1),)), "d0")
    assert program.operation(0, 0, "F").target is None
    assert program.operation(0, 1, "F").output_of == (0, "F")
    assert program.operation(0, 0, "B").output_of == (1, "B")
    assert program.operation(0, 1, "B").output_of is None


def test_weights_are_the_devices_own_or_the_one_copy():
    copies = HostProgram(Plan((TWO, TWO)), "server")
    assert copies.replica_key(1, 1) == copies.operation(1, 1, "L").replica_key == (1, 1)
    one = HostProgram(Plan((TWO, TWO), order="sequential", weights="shared"), "server")
    assert one.replica_key(1, 1) == (ALL, 1)
    assert one.replica_key(1, 0) == (1, 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((DevicePlan((), ("device",)),), weights="shared"), "no stage serves all devices"),
        (Plan((TWO, DevicePlan((1,), ("device", "server"))), weights="shared"), "no stage serves"),
        (Plan((DevicePlan((1,), ("device", "cloud")),)), "device 0 has stages on cloud"),
        (Plan((DevicePlan((1,), ("n1", "n2")),)), "the first stage must be there too"),
        (Plan((DevicePlan((1, 2), ("device", "server", "device")),)), "visits server twice"),
        (Plan((DevicePlan((1,), ("device", "d1")), TWO)), "device 0 has stages on d1"),
    ],
)
def test_a_plan_that_nobody_could_carry_out_is_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        check_executable(plan)


def test_two_boundaries_between_two_hosts_have_links_of_their_own():
    """Activations that fill one link must not keep cotangents from the other."""
    plan, link_table = Plan((U_SHAPE,)), LinkTable("d0")
    first, second = plan.boundaries()
    assert (first, second) == (Boundary("d0", "n1", 0), Boundary("n1", "d0", 1))
    assert [dialler(one) for one in direct(plan.boundaries())] == ["d0", "d0"]
    assert link_table.missing(plan.boundaries()) == [first, second]
    program = HostProgram(plan, "d0")
    assert program.operation(0, 0, "F").target == first
    assert program.operation(0, 2, "L").target == second


def test_a_cap_holds_forwards_and_backwards_of_shared_stages_alone():
    plan = Plan((U_SHAPE, U_SHAPE), weights="shared", in_flight=1)
    program = HostProgram(plan, "n1")
    assert program.operation(1, 1, "F").limited and program.operation(0, 1, "B").limited
    assert program.operation(ALL, 1, "U").replica_key == program.replica_key(0, 1) == (ALL, 1)
    assert not any(one.limited for one in HostProgram(plan, "d0").operations())
    assert plan.local_stages("n1") == (1,)


def test_targets_and_side_inputs_go_up_to_the_last_host_that_needs_them():
    sides = [(), ("mask",), (), ("lengths", "mask")]
    two = Plan((DevicePlan((1,), ("device", "server"), 1),))
    assert find_beside(two, 0, 0, sides) == Beside(True, ("lengths", "mask"))
    three = Plan((DevicePlan((1, 2), ("device", "n1", "server"), 1),))
    assert find_beside(three, 0, 0, sides) == Beside(True, ("lengths", "mask"))
    assert find_beside(three, 0, 1, sides) == Beside(True, ("lengths", "mask"))
    home = Plan((DevicePlan((1, 3), ("device", "n1", "device"), 1),))
    assert find_beside(home, 0, 0, sides) == Beside(False, ("mask",))
    assert find_beside(home, 0, 1, sides) == Beside()
