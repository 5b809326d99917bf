"""The simulator: the paper's recurrence where both apply, the rules of a schedule everywhere."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipar_jax.errors import ScheduleError
from pipar_jax.schedule.actions import COMPUTE, RECEIVES, Action, Span, parse
from pipar_jax.schedule.host_program import Bare, HostProgram
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.simulator import Costs, LinkModel, Prediction, simulate
from pipar_jax.tuner.recurrence import MicroTimes, measured_step_s

SECONDS = {"F": 0.002, "L": 0.003, "B": 0.004, "U": 0.01, "A": 0.05}
PAIR = ("device", "server")


def seconds_of(device: int, stage: int, kind: str, samples: int) -> float:
    return SECONDS[kind] * (samples or 1) * (1 + 0.25 * max(device, 0) + 0.1 * stage)


def bytes_of(device: int, stage: int, kind: str, samples: int) -> float:
    return 1000.0 * (samples or 50) * (1 + stage)


def links_of(plan: Plan, up: LinkModel, down: LinkModel) -> dict[tuple[str, str], LinkModel]:
    """Return the same link for every device to every host, and a fast one between nodes."""
    links = {}
    for one, other in itertools.permutations(plan.hosts(), 2):
        if one.startswith("d"):
            links[one, other] = up
        elif other.startswith("d"):
            links[one, other] = down
        else:
            links[one, other] = LinkModel(1e7)
    return links


def round_of(plan: Plan, samples: int = 64, batch_size: int = 16, steps: int = 4) -> RoundSchedule:
    spans = tuple(Span(d, 0, steps) for d in range(len(plan.devices)))
    return RoundSchedule(plan, spans, (samples,) * len(plan.devices), batch_size)


def pair_plan(devices: int = 1, micro_batches: int = 4, **values: object) -> Plan:
    return Plan((DevicePlan((1,), PAIR, micro_batches),) * devices, **values)  # type: ignore[arg-type]


# --- against what is known ---------------------------------------------------------------------


@given(
    st.integers(1, 12),
    st.lists(st.floats(0.0001, 0.1), min_size=7, max_size=7),
    st.integers(12, 40),
)
@settings(max_examples=60, deadline=None)
def test_one_step_of_one_device_is_the_recurrence(
    micro_batches: int, times: list[float], batch: int
) -> None:
    forward_s, server_s, backward_s, up, down, device_update_s, server_update_s = times
    plan = pair_plan(1, micro_batches, dispatch="fixed")
    per_sample = {"F": forward_s, "L": server_s, "B": backward_s}

    def compute_s(device: int, stage: int, kind: str, samples: int) -> float:
        if kind == "U":
            return server_update_s if stage else device_update_s
        return per_sample[kind] * samples if kind in per_sample else 0.0

    links = {("d0", "server"): LinkModel(1 / up), ("server", "d0"): LinkModel(1 / down)}
    costs = Costs(compute_s, lambda device, stage, kind, samples: float(samples), links=links)
    schedule = round_of(plan, batch, batch, 1)
    sizes = schedule.sizes(0, 0)
    expected = measured_step_s(
        MicroTimes(
            [forward_s * n for n in sizes], [up * n for n in sizes], [server_s * n for n in sizes],
            [down * n for n in sizes], [backward_s * n for n in sizes],
            device_update_s, server_update_s,
        )
    )  # fmt: skip
    assert simulate(schedule, costs).seconds == pytest.approx(expected, abs=1e-9)


def test_a_federated_round_by_hand() -> None:
    plan = Plan((DevicePlan((), ("device",)),) * 2)
    up, down = LinkModel(1e5, 0.1, 0.05), LinkModel(2e5, 0.1)
    costs = Costs(seconds_of, bytes_of, links_of(plan, up, down))
    found = simulate(round_of(plan, steps=3), costs)
    # Release 0.1; the slower device 3 x (16 L + U) x 1.25; weights of 50 kB up 0.05 + 0.5 + 0.1;
    # average; down 0.25 + 0.1; the answer up 0.05 + 0.1.
    expected = 0.1 + 3 * (16 * 0.003 + 0.01) * 1.25 + 0.65 + 0.05 + 0.35 + 0.15
    assert found.seconds == pytest.approx(expected)
    assert found.busy_s["server"] == pytest.approx(0.05)
    assert found.carried_bytes["d0", "server"] == 50_000
    assert found.idle_share("d1") == pytest.approx(1 - 3 * 0.058 * 1.25 / expected)


def test_a_sequential_round_hands_the_part_on_through_the_coordinator() -> None:
    plan = pair_plan(2, 1, order="sequential", weights="shared")
    costs = Costs(seconds_of, bytes_of, links_of(plan, LinkModel(1e5), LinkModel(1e5)))
    held = dataclasses.replace(round_of(plan, steps=2), holder=0)
    found = simulate(held, costs)
    check_rules(found, held, costs)
    kinds = Counter((host, row.action.kind) for host, row in found.trace.rows())
    assert kinds["d0", "H"] == 2  # handing on, and sending what is handed on
    assert kinds["d0", "RH"] == 0  # it had the part
    assert kinds["d1", "RH"] == 1
    first = [row for row in found.trace.hosts["d0"] if row.action.kind == "H"]
    arrival = next(row for row in found.trace.hosts["d1"] if row.action.kind == "RH")
    assert arrival.end_s == pytest.approx(max(row.end_s for row in first) + 0.5)
    without = simulate(round_of(plan, steps=2), costs)
    assert without.seconds == pytest.approx(found.seconds + 0.5)  # the part had to be fetched


def test_a_sequential_round_over_unlimited_links_ends_however_delays_are_rounded() -> None:
    """A part may arrive a step of the simulator's grid before its device has begun."""
    draw = random.Random(0)
    plan = pair_plan(2, 1, order="sequential", weights="shared")
    for _ in range(60):
        link = LinkModel(None, draw.uniform(0, 0.01), draw.uniform(0, 0.001))
        costs = Costs(seconds_of, bytes_of, links_of(plan, link, link))
        assert simulate(round_of(plan, steps=1), costs).seconds > 0


def test_what_has_rested_takes_longer_once_for_each_of_its_computations() -> None:
    plan, slow = pair_plan(1, 4, dispatch="fixed"), {"F": 0.5, "L": 1.0, "B": 2.0, "U": 4.0}
    without = Costs(seconds_of, bytes_of, links_of(plan, LinkModel(), LinkModel()))
    costs = dataclasses.replace(without, after_rest_s=lambda d, s, kind, n: slow[kind])
    found = simulate(round_of(plan, steps=2), costs)
    rows = [(row, row.end_s - row.start_s) for row in found.trace.hosts["d0"]]
    longer = [
        (str(row.action.kind), row.action.step, row.action.micro_batch)
        for row, seconds in rows
        if row.action.kind in slow
        and seconds > seconds_of(0, 0, row.action.kind, row.samples) + 0.1
    ]
    # Forwards follow one another; a backward waits for the server; the rest follows at once.
    assert longer == [("F", 0, 0), ("B", 0, 0), ("U", 0, 0), ("F", 1, 0), ("B", 1, 0),
                      ("U", 1, 0)]  # fmt: skip
    quick = dataclasses.replace(costs, after_rest_s=lambda d, s, kind, n: 0.0)
    assert simulate(round_of(plan, steps=2), quick).seconds == (
        simulate(round_of(plan, steps=2), without).seconds
    )


def test_codecs_take_time_beside_the_processor() -> None:
    plan = pair_plan(1, 1, dispatch="fixed")
    links = links_of(plan, LinkModel(), LinkModel())
    plain = Costs(seconds_of, bytes_of, links)
    coded = dataclasses.replace(
        plain, codec_s=lambda d, s, kind, n: {"SF": 1, "RF": 2, "SB": 4, "RB": 8}[kind] * 1.0
    )
    one = round_of(plan, steps=1)
    assert simulate(one, coded).seconds - simulate(one, plain).seconds == pytest.approx(15.0)
    assert simulate(one, coded).busy_s == simulate(one, plain).busy_s


# --- the rules of every schedule -----------------------------------------------------------------


def check_rules(found: Prediction, schedule: RoundSchedule, costs: Costs) -> None:
    """Check a collected trace against the schedule that it came from."""
    rows = {(host, row.action): row for host, row in found.trace.rows()}
    by_action = {action: row for (_, action), row in rows.items()}
    wanted: dict[Action, set[Action]] = defaultdict(set)
    for step in [*schedule.steps(), schedule.closing()]:
        for action, before in step:
            wanted[action] |= set(before)
    done = Counter(row.action for _, row in found.trace.rows() if row.action.kind in COMPUTE)
    expected = {action for action in wanted if action.kind in COMPUTE}
    assert set(done) == expected
    assert set(done.values()) <= {1}
    for action, before in wanted.items():
        if action not in by_action:
            continue  # what stays on a host, such as its weights, is neither sent nor received
        row = by_action[action]
        for one in before:
            if one in by_action:
                begins = row.end_s if action.kind in RECEIVES else row.start_s
                assert by_action[one].end_s <= begins + 1e-9, f"{action} ran before {one} was over"
    for host in found.trace.hosts:
        _check_no_overlap([r for (h, a), r in rows.items() if h == host and a.kind in COMPUTE])
    _check_credits(found, schedule, costs)
    assert max(row.end_s for _, row in found.trace.rows()) <= found.seconds + 1e-9
    for host, busy_s in found.busy_s.items():
        assert found.trace.busy_s(host, found.trace.rounds[0]) == pytest.approx(busy_s)


def _check_no_overlap(rows: list) -> None:
    ordered = sorted(rows, key=lambda row: (row.start_s, row.end_s))
    for one, other in itertools.pairwise(ordered):
        assert one.end_s <= other.start_s + 1e-9


def _check_credits(found: Prediction, schedule: RoundSchedule, costs: Costs) -> None:
    """Check that no link direction ever held more than its window, unless it held one alone."""
    if costs.window_bytes is None:
        return
    plan = schedule.plan
    changes: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    rows = {row.action: row for _, row in found.trace.rows()}
    for host, row in found.trace.rows():
        action = row.action
        if action.kind not in ("SF", "SB"):
            continue
        target_stage = action.stage + (1 if action.kind == "SF" else -1)
        target = plan.host(action.device, target_stage)
        last = target_stage == plan.devices[action.device].stages - 1
        consumer = "B" if action.kind == "SB" else "L" if last else "F"
        consumed = rows[action._replace(stage=target_stage, kind=consumer)].end_s
        below = -1 if "server" in (host, target) else min(action.stage, target_stage)
        changes[host, target, below] += [(row.start_s, row.nbytes), (consumed, -row.nbytes)]
    for direction, events in changes.items():
        held = waiting = 0.0
        for _, change in sorted(events):
            held += change
            waiting += 1 if change > 0 else -1
            assert held <= costs.window_bytes + 1e-6 or waiting == 1, direction


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Return plans of every shape: two hosts, chains, U-shapes, no cut, unequal devices."""
    devices = draw(st.integers(1, 4))
    shape = draw(st.sampled_from(["pair", "mixed", "chain", "u"]))
    count = st.integers(1, 5)
    if shape == "chain":
        one = DevicePlan((1, 2), ("device", "n1", "server"), draw(count))
        chains = (one,) * devices
    elif shape == "u":
        hosts = ("device", "n1", "n2", "device")[: draw(st.integers(3, 4))]
        hosts = (*hosts[:-1], "device")
        chains = (DevicePlan(tuple(range(1, len(hosts))), hosts, draw(count)),) * devices
    elif shape == "mixed":
        chains = tuple(
            draw(
                st.sampled_from(
                    [DevicePlan((), ("device",)), DevicePlan((1,), PAIR, 3),
                     DevicePlan((2,), PAIR, 1)]
                )
            )
            for _ in range(devices)
        )  # fmt: skip
    else:
        chains = (DevicePlan((1,), PAIR, draw(count)),) * devices
    sequential = shape == "pair" and draw(st.booleans())
    shared = sequential or (shape in ("chain", "pair") and draw(st.booleans()))
    return Plan(
        chains,
        order="sequential" if sequential else "parallel",
        weights="shared" if shared else "copy",
        in_flight=draw(st.sampled_from([0, 1, 3])) if shared and not sequential else 0,
        dispatch=draw(st.sampled_from(["fcfs", "backward_first", "slowest_first", "fixed"])),
        aggregate_every=0 if sequential else draw(st.sampled_from([0, 2])),
        hand_on=draw(st.sampled_from(["epoch", "step"])),
    )


links = st.builds(
    LinkModel, st.sampled_from([None, 1e5, 3e6]), st.sampled_from([0.0, 0.02]), st.just(0.001)
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plans(), links, links, st.sampled_from([None, 1.0, 20_000.0]), st.integers(0, 2),
    st.integers(5, 40), st.data(),
)  # fmt: skip
def test_every_action_happens_once_in_order_and_within_its_credit(
    plan: Plan,
    up: LinkModel,
    down: LinkModel,
    window: float | None,
    ahead: int,
    samples: int,
    data: st.DataObject,
) -> None:
    if plan.weights == "copy":  # shared updates need the same steps on all devices
        unequal = st.integers(5, 40)
        samples_of = tuple(data.draw(unequal) for _ in plan.devices)
    else:
        samples_of = (samples,) * len(plan.devices)
    costs = Costs(seconds_of, bytes_of, links_of(plan, up, down), window_bytes=window, ahead=ahead)
    steps = [-(-count // 8) for count in samples_of]
    for spans in rounds(plan, steps, 2)[:2]:
        schedule = RoundSchedule(plan, spans, samples_of, 8)
        found = simulate(schedule, costs)
        check_rules(found, schedule, costs)
        brief = simulate(schedule, costs, collect=False)
        assert brief.seconds == found.seconds
        assert brief.actions == found.actions


def test_a_slow_downlink_delays_nobody_else() -> None:
    plan = pair_plan(2, 4)
    fast = LinkModel(1e7)
    even = links_of(plan, fast, fast)
    slow = {**even, ("server", "d1"): LinkModel(1e4)}
    window = 3000.0
    rows = [
        simulate(round_of(plan), Costs(seconds_of, bytes_of, one, window_bytes=window)).trace
        for one in (even, slow)
    ]
    ends = [max(r.end_s for r in trace.hosts["d0"] if r.action.kind == "U") for trace in rows]
    assert ends[1] <= ends[0] * 1.02


def test_policies_order_what_is_ready() -> None:
    """One host that serves both devices at once: the policy shows in what it computes when."""
    plan = Plan((DevicePlan((1,), PAIR, 2),) * 2, dispatch="slowest_first")
    costs = Costs(seconds_of, bytes_of, links_of(plan, LinkModel(), LinkModel()), ahead=0)
    order = [
        row.action.device
        for row in simulate(round_of(plan, steps=1), costs).trace.hosts["server"]
        if row.action.kind == "L"
    ]
    assert order.index(1) <= 1  # device 1 is slower: it is served as soon as it is there
    in_turn = dataclasses.replace(plan, dispatch="fixed")
    rows = simulate(round_of(in_turn, steps=1), costs).trace.hosts["d0"]
    kinds = [row.action.kind for row in rows if row.action.kind in "FB"]
    assert kinds == ["F", "F", "B", "B"]


# --- what cannot finish --------------------------------------------------------------------------


def waiting_for(monkeypatch: pytest.MonkeyPatch, **waits: str) -> None:
    """Let actions, named with _ for the dot and at for the @, wait for others as well."""
    more = {parse(a.replace("_", ".").replace("at", "@")): parse(b) for a, b in waits.items()}
    plain = HostProgram.step

    def step(self: HostProgram, *arguments: object, **values: object) -> list[Bare]:
        return [
            (action, (*before, more[action]) if action in more else before)
            for action, before in plain(self, *arguments, **values)
        ]

    monkeypatch.setattr(HostProgram, "step", step)


def test_a_circle_is_refused_with_the_grid_and_the_cell(monkeypatch) -> None:
    # The second forward waits for the first backward, and that for it.
    waiting_for(monkeypatch, d0_0F1at0="d0.0B0@0", d0_0B0at0="d0.0F1@0")
    schedule = RoundSchedule(pair_plan(1, 2), (Span(0, 0, 1),), (8,), 8)
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule, Costs(seconds_of))
    text = str(caught.value)
    assert "deadlocks after 6 actions" in text
    assert "waits for itself" in text
    assert "d0.0F1@0 waits for d0.0B0@0" in text or "d0.0B0@0 waits for d0.0F1@0" in text
    assert ">>d0.0" in text
    assert "server | d0.1L0@0" in text


def test_waiting_for_what_nobody_does_is_refused(monkeypatch) -> None:
    waiting_for(monkeypatch, d0_0F1at0="d7.0U@3")
    schedule = RoundSchedule(pair_plan(1, 2), (Span(0, 0, 1),), (8,), 8)
    with pytest.raises(
        ScheduleError, match=r"cannot run d0.0F1@0.*d7.0U@3, which no host performs"
    ):
        simulate(schedule, Costs(seconds_of))


def test_where_both_ways_share_a_link_a_narrow_window_is_refused_and_a_wider_one_cures_it() -> None:
    plan = Plan((DevicePlan((1, 2), ("device", "server", "device"), 4),))
    costs = Costs(seconds_of, bytes_of, window_bytes=1.0)
    with pytest.raises(ScheduleError, match=r"has no credit for \d+ bytes.*widen the window"):
        simulate(round_of(plan), costs)
    wide = dataclasses.replace(costs, window_bytes=1e5)
    check_rules(simulate(round_of(plan), wide), round_of(plan), wide)


def test_a_u_shape_over_one_node_needs_no_wide_window() -> None:
    """Both of its boundaries join the same two hosts, each with a link and a credit of its own."""
    plan = Plan((DevicePlan((1, 2), ("device", "n1", "device"), 4),) * 2)
    costs = Costs(seconds_of, bytes_of, links_of(plan, LinkModel(1e6), LinkModel(2e6)),
                  window_bytes=1.0)  # fmt: skip
    found = simulate(round_of(plan), costs)
    check_rules(found, round_of(plan), costs)
    # An empty window takes one micro-batch of any size, and so a wider one is faster.
    wide = dataclasses.replace(costs, window_bytes=None)
    assert found.seconds > simulate(round_of(plan), wide).seconds
    assert found.carried_bytes["d0", "n1"] == 4 * 16 * (1000 + 3000)


def test_what_a_device_sends_shares_one_line_and_nodes_do_not() -> None:
    """The device's activations and its last stage's cotangents, to different nodes."""
    plan = Plan((DevicePlan((1, 2, 3), ("device", "n1", "n2", "device"), 4),))
    costs = Costs(seconds_of, bytes_of, links_of(plan, LinkModel(2e5), LinkModel(2e5)))
    rows = simulate(round_of(plan), costs).trace.hosts
    sent = sorted((row.start_s, row.end_s) for row in rows["d0"] if row.action.kind in ("SF", "SB"))
    assert len(sent) == 4 * 4 * 2
    assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(sent))
    down = [
        sorted((r.start_s, r.end_s) for r in rows[n] if r.action.kind == k and r.action.stage == s)
        for n, k, s in (("n1", "SB", 1), ("n2", "SF", 2))
    ]
    assert any(a < d and c < b for a, b in down[0] for c, d in down[1])  # at the same time


# --- steady states -------------------------------------------------------------------------------


def resting_s(device: int, stage: int, kind: str, samples: int) -> float:
    assert samples == 0
    return 0.0 if kind == "A" else 0.001 * (1 + stage)


@pytest.mark.parametrize("plan", [
    pair_plan(1, 4),
    pair_plan(3, 4, dispatch="backward_first"),
    pair_plan(2, 3, weights="shared"),
    pair_plan(2, 2, order="sequential", weights="shared"),
    Plan((DevicePlan((1, 2), ("device", "n1", "device"), 4),) * 2),
])  # fmt: skip
@pytest.mark.parametrize("samples", [16 * 100, 16 * 100 + 5, 16 * 30 + 1])
@pytest.mark.parametrize("rests", [False, True])
def test_long_rounds_are_extrapolated_exactly(plan: Plan, samples: int, rests: bool) -> None:
    def alike_s(device: int, stage: int, kind: str, samples: int) -> float:
        return seconds_of(0, stage, kind, samples)

    costs = Costs(alike_s, bytes_of, links_of(plan, LinkModel(2e6, 0.003), LinkModel(4e6, 0.003)),
                  window_bytes=30_000.0, after_rest_s=resting_s if rests else None)  # fmt: skip
    schedule = round_of(plan, samples, 16, 100)
    full = simulate(schedule, costs)
    brief = simulate(schedule, costs, collect=False)
    assert brief.left_out > 20
    assert brief.seconds == full.seconds
    assert brief.actions == full.actions
    assert brief.carried_bytes == pytest.approx(full.carried_bytes)
    assert brief.busy_s == full.busy_s


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plans(), links, links, st.sampled_from([None, 1.0, 20_000.0]), st.integers(0, 2),
    st.integers(200, 420), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_is_left_out_changes_no_time(
    plan: Plan,
    up: LinkModel,
    down: LinkModel,
    window: float | None,
    ahead: int,
    samples: int,
    alike: bool,
    rests: bool,
) -> None:
    def compute_s(device: int, stage: int, kind: str, samples: int) -> float:
        return seconds_of(0 if alike else device, stage, kind, samples)

    costs = Costs(compute_s, bytes_of, links_of(plan, up, down), window_bytes=window, ahead=ahead,
                  after_rest_s=resting_s if rests else None)  # fmt: skip
    schedule = round_of(plan, samples, 8, -(-samples // 8))
    full = simulate(schedule, costs)
    brief = simulate(schedule, costs, collect=False)
    assert brief.seconds == full.seconds
    assert brief.actions == full.actions
    assert brief.carried_bytes == pytest.approx(full.carried_bytes)
    assert brief.busy_s == full.busy_s


def test_devices_of_different_speeds_are_simulated_in_full() -> None:
    plan = pair_plan(2, 4)
    costs = Costs(seconds_of, bytes_of)
    schedule = round_of(plan, 1600, 16, 60)
    brief = simulate(schedule, costs, collect=False)
    assert brief.seconds == simulate(schedule, costs).seconds
