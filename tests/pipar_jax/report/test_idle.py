"""Idle time by cause, on traces written by hand and on simulated ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipar_jax.report.idle import CAUSES, idle_causes, total_causes
from pipar_jax.schedule.actions import Span, parse
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.trace import Interval, Timed, Trace
from pipar_jax.simulator import Costs, LinkModel, simulate

ROUND = Interval(0.0, 100.0)


def trace_of(hosts: dict[str, list[tuple[str, float, float]]], **meta: object) -> Trace:
    rows = {
        host: [Timed(parse(text), start, end) for text, start, end in some]
        for host, some in hosts.items()
    }
    return Trace(rows, [ROUND], {"plan": dict(meta)})


def nonzero(causes: dict[str, float]) -> dict[str, float]:
    return {cause: pytest.approx(seconds) for cause, seconds in causes.items() if seconds}


def test_one_step_of_a_pair_by_hand() -> None:
    trace = trace_of(
        {
            "d0": [
                ("d0.0F0@0", 4, 10),
                ("d0.0SF0@0", 11, 19),
                ("d0.0RB0@0", 33, 40),
                ("d0.0B0@0", 41, 55),
                ("d0.0U@0", 55, 60),
            ],
            "server": [
                ("d0.1RF0@0", 12, 20),
                ("d0.1L0@0", 22, 30),
                ("d0.1U@0", 30, 31),
                ("d0.1SB0@0", 32, 39),
                ("d*.0A@0", 80, 90),
            ],
        }
    )
    found = idle_causes(trace, ROUND)
    # 0-4 for its samples; from 10 its activation travels to 20, the server picks it up at 22 and
    # computes to 30; the cotangent travels to 40 and waits for 1; from 60 on it waits for weights.
    assert nonzero(found["d0"]) == {
        "data": 4, "network": 10 + 10, "other": 2 + 1, "server": 8, "aggregation": 40,
    }  # fmt: skip
    # 0-4 the device's data, 4-10 the device, 10-20 network, 20-22 itself; 31-40 the cotangent's
    # way, 41-60 the device; 60-80 and 90-100 weights.
    assert nonzero(found["server"]) == {
        "data": 4, "device": 6 + 19, "network": 10 + 9, "other": 2 + 1, "aggregation": 30,
    }  # fmt: skip


def test_waiting_for_the_slowest_device_is_waiting_for_a_device() -> None:
    trace = trace_of(
        {
            "d0": [("d0.0L0@0", 0, 10), ("d0.0U@0", 10, 12)],
            "d1": [("d1.0L0@0", 0, 50), ("d1.0U@0", 50, 60)],
            "server": [("d*.0A@0", 70, 75)],
        }
    )
    found = idle_causes(trace, ROUND)
    assert nonzero(found["d0"]) == {"device": 48, "aggregation": 40}
    assert nonzero(found["d1"]) == {"aggregation": 40}
    assert nonzero(found["server"]) == {"device": 60, "aggregation": 35}


def test_waiting_in_the_servers_queue_is_waiting_for_the_server() -> None:
    trace = trace_of(
        {
            "d0": [("d0.0F0@0", 0, 10), ("d0.0RB0@0", 50, 52), ("d0.0B0@0", 52, 100)],
            "server": [
                ("d0.1RF0@0", 10, 12),
                ("d1.1L0@0", 5, 30),  # d1's forward is not in the trace
                ("d0.1L0@0", 30, 50),
            ],
        }
    )
    found = idle_causes(trace, ROUND)
    assert nonzero(found["d0"]) == {"server": 30 - 10 + 20, "network": 2}
    assert nonzero(found["server"]) == {"other": 5, "network": 2, "device": 48}


def test_missing_credit_within_a_mini_batch_is_the_network() -> None:
    trace = trace_of(
        {"d0": [("d0.0F0@0", 0, 10), ("d0.0F1@0", 30, 40), ("d0.0F0@1", 45, 100)], "server": []}
    )
    found = idle_causes(trace, ROUND)
    assert nonzero(found["d0"]) == {"network": 20, "data": 5}


def test_a_sequential_turn_waits_for_the_other_device() -> None:
    trace = trace_of(
        {
            "d0": [("d0.0L0@0", 0, 30), ("d0.0U@0", 30, 40)],
            "d1": [("d1.0L0@0", 60, 80), ("d1.0U@0", 80, 90)],
        },
        order="sequential",
    )
    found = idle_causes(trace, ROUND)
    assert nonzero(found["d1"]) == {"device": 40, "network": 20, "aggregation": 10}
    assert nonzero(found["d0"]) == {"device": 30, "network": 20, "aggregation": 10}


def test_a_middle_node_counts_as_a_server_to_its_neighbours() -> None:
    trace = trace_of(
        {
            "d0": [("d0.0F0@0", 0, 10), ("d0.2RF0@0", 58, 60), ("d0.2L0@0", 60, 100)],
            "n1": [("d0.1RF0@0", 10, 20), ("d0.1F0@0", 20, 50)],
        }
    )
    assert nonzero(idle_causes(trace, ROUND)["d0"]) == {"network": 10 + 10, "server": 30}


def test_rows_of_other_rounds_do_not_count() -> None:
    rows = [("d0.0L0@0", -50, 10), ("d0.0L0@1", 90, 150), ("d0.0L0@2", 160, 170)]
    found = idle_causes(trace_of({"d0": rows}), ROUND)  # type: ignore[arg-type]
    assert nonzero(found["d0"]) == {"data": 80}


def test_a_host_that_did_nothing_waited_all_the_time() -> None:
    found = idle_causes(trace_of({"d0": [("d0.0L0@0", 0, 70)]}), ROUND)
    assert nonzero(found["server"]) == {"device": 70, "aggregation": 30}


def test_rounds_add_up() -> None:
    one = idle_causes(trace_of({"d0": [("d0.0L0@0", 0, 70)]}), ROUND)
    total = total_causes([one, one])
    assert nonzero(total["server"]) == {"device": 140, "aggregation": 60}
    assert set(total["d0"]) == set(CAUSES)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.booleans(), st.sampled_from([1e4, 1e6]),
    st.sampled_from([("device", "server"), ("device", "n1", "device")]),
)  # fmt: skip
def test_the_causes_add_up_to_the_idle_time(
    devices: int, micro_batches: int, sequential: bool, rate: float, hosts: tuple[str, ...]
) -> None:
    sequential = sequential and hosts[-1] == "server"
    plan = Plan(
        (DevicePlan(tuple(range(1, len(hosts))), hosts, micro_batches),) * devices,
        order="sequential" if sequential else "parallel",
        weights="shared" if sequential else "copy",
    )
    links = {
        (one, other): LinkModel(rate, 0.01)
        for one in plan.hosts() for other in plan.hosts() if one != other
    }  # fmt: skip
    costs = Costs(
        lambda device, stage, kind, samples: 0.01 * (samples or 1) * (1 + max(device, 0)),
        lambda device, stage, kind, samples: 100.0 * (samples or 10), links,
    )  # fmt: skip
    spans = tuple(Span(d, 0, 3) for d in range(devices))
    found = simulate(RoundSchedule(plan, spans, (20,) * devices, 8), costs)
    causes = idle_causes(found.trace, found.trace.rounds[0])
    for host in plan.hosts():
        idle_s = found.seconds - found.busy_s[host]
        assert sum(causes[host].values()) == pytest.approx(idle_s, abs=1e-9)
        # A simulated host starts what is ready at once: nothing but causes is left.
        assert causes[host]["other"] <= 0.011 * (1 + sequential)
