"""The search against brute force, its bounds against the simulator, and what it must prefer."""

from __future__ import annotations

import dataclasses
import time

import pytest

import pipar_jax
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.schedule.plan import Codecs, Plan
from pipar_jax.simulator import LinkModel
from pipar_jax.simulator.predict import estimate, round_of
from pipar_jax.tuner import StageCosts, labels, loads, memory_bytes, search, tune
from pipar_jax.tuner.bounds import DeviceOption, least, round_bound_s
from pipar_jax.tuner.paper import choose
from pipar_jax.tuner.recurrence import paper_choice
from tests.pipar_jax.tuner.profiles import config, device, host, profile

NUMBERS = (1, 2, 5, 10)
LINKS = ("4g", "wifi", "lan", "none")


def brute(made, count, dispatches) -> float:
    """The best epoch over everything, by simulating all of it."""
    stages, best_s = StageCosts(made), float("inf")
    for cut in range(len(made.units)):
        for n in NUMBERS if cut else (1,):
            for dispatch in dispatches:
                chain = DeviceOption(cut, n).device_plan()
                plan = Plan((chain,) * count, dispatch=dispatch)
                best_s = min(best_s, estimate(stages, plan).epoch_s)
    return best_s


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("slower", [1.0, 10.0])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_devices_get_what_brute_force_finds(link, slower, count):
    made = profile(*[device(link, slower, samples=250)] * count)
    found = search(made, config(count, methods="fl,sfl,pipar", micro_batches="2,5,10"))
    assert found.exact
    dispatches = ("fcfs", "fixed", "backward_first")
    assert found.plans[0].epoch_s == pytest.approx(brute(made, count, dispatches), rel=1e-9)
    assert found.judged < found.candidates
    assert found.gap <= 1e-9


@pytest.mark.parametrize("link", ["4g", "wifi", "none"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "option", [DeviceOption(0), DeviceOption(1), DeviceOption(2, 5), DeviceOption(4, 10)]
)
def test_no_plan_undercuts_its_bound(link, count, option):
    made = profile(*[device(link, 3.0, samples=250), device("4g", 1.0, 120),
                     device("wifi", 8.0, 330)][:count])  # fmt: skip
    stages = StageCosts(made)
    plan = Plan((option.device_plan(),) * count, dispatch="fcfs")
    spans = {span.device: span for span in round_of(made, plan).spans}
    bound_s = round_bound_s(stages, [least(stages, d, option, spans[d]) for d in range(count)])
    for dispatch in ("fcfs", "fixed", "backward_first"):
        seconds = estimate(stages, dataclasses.replace(plan, dispatch=dispatch)).round.seconds
        assert seconds >= bound_s * (1 - 1e-9)
    if count == 1:  # all forwards first is the recurrence itself
        fixed_s = estimate(stages, dataclasses.replace(plan, dispatch="fixed")).round.seconds
        assert fixed_s == pytest.approx(bound_s, rel=0.02)


def test_fl_is_chosen_where_the_link_is_hopeless_and_the_device_is_quick():
    slow = LinkModel(1e5, 0.05)
    one = dataclasses.replace(device("none"), up=slow, down=slow)
    assert labels(tune(profile(one), config()))["method"] == "fl"


def test_no_pipeline_where_small_micro_batches_cost_too_much():
    one = device("none", fixed_s=0.05)
    made = dataclasses.replace(profile(one), server=host(fixed_s=0.05))
    best = search(made, config(methods="sfl,pipar")).plans[0].plan
    assert labels(best)["method"] == "sfl"


def test_a_pipeline_where_the_device_is_slow_and_the_link_is_not():
    best = tune(profile(device("wifi", 10.0)), config())
    assert labels(best)["method"] == "pipar"
    assert best.devices[0].micro_batches > 1


def test_sl_is_chosen_where_the_server_has_no_room_for_copies():
    ones = [dataclasses.replace(one, host=dataclasses.replace(one.host, memory_bytes=15e6))
            for one in [device("lan", 2.0)] * 8]  # fmt: skip
    made = profile(*ones)
    made = dataclasses.replace(made, server=dataclasses.replace(made.server, memory_bytes=17e6))
    best = tune(made, config(8, methods="sfl,pipar,sl"))
    assert labels(best)["method"] == "sl"
    assert memory_bytes(StageCosts(made), best)["server"] <= 17e6


def test_memory_that_no_plan_fits_into_is_an_error_that_says_so():
    one = device("lan")
    one = dataclasses.replace(one, host=dataclasses.replace(one.host, memory_bytes=1e3))
    with pytest.raises(PlanError, match=r"d0 needs .* MB of 0.*memory_mb"):
        tune(profile(one), config())


def test_a_model_that_cannot_be_cut_leaves_nothing_without_fl():
    made = profile(device(units=1), units=1)
    with pytest.raises(ConfigError, match="allow fl"):
        tune(made, config(methods="pipar"))
    assert labels(tune(made, config()))["method"] == "fl"


def test_unequal_devices_are_no_worse_than_their_best_common_plan_and_tell_their_gap():
    made = profile(*(device("wifi", slower, 300) for slower in (1.0, 5.0, 20.0)))
    found = search(made, config(3, methods="fl,sfl,pipar", micro_batches="2,5,10"))
    best = found.plans[0]
    common_s = brute(made, 3, ("fcfs", "fixed", "backward_first", "slowest_first"))
    assert best.epoch_s <= common_s * (1 + 1e-9)
    assert len({one.cuts for one in best.plan.devices}) > 1
    assert best.epoch_s >= found.bound_s * (1 - 1e-9)
    assert found.gap < 0.1


def test_a_codec_is_used_only_where_it_is_allowed_and_helps():
    made = profile(device("4g", 10.0))
    plain = search(made, config(methods="pipar")).plans[0]
    coded = search(made, config(methods="pipar", codecs="raw,float16")).plans[0]
    assert {pair.activation for one in plain.plan.devices for pair in one.codecs} == {"raw"}
    assert {pair.activation for one in coded.plan.devices for pair in one.codecs} == {"float16"}
    assert coded.epoch_s < plain.epoch_s
    settings = config(methods="pipar")
    settings.pipeline.activation_codec = "float16"  # configured, so not the tuner's to choose
    given = search(made, settings)
    for one in (given.plans[0], given.paper):
        assert one.plan.devices[0].codecs == (Codecs("float16", "raw"),)
    with pytest.raises(ConfigError, match=r"bfloat16.*does not have"):
        search(made, config(codecs="bfloat16"))


def test_the_papers_selection_is_a_mode_and_stands_beside_the_search():
    made = profile(device("4g", 3.0))
    plan = tune(made, config(select="paper"))
    choice = choose(StageCosts(made), 0)
    assert (plan.devices[0].cuts, plan.devices[0].micro_batches) == (
        (choice.cut,), choice.micro_batches,
    )  # fmt: skip
    found = search(made, config())
    assert found.paper is not None and found.paper.plan == plan
    assert found.plans[0].epoch_s <= found.paper.epoch_s
    assert paper_choice.__module__ == "pipar_jax.tuner.recurrence"


def test_averaging_every_few_steps_is_counted_for_the_whole_epoch():
    made, settings = profile(device("4g", 2.0, 1000)), config(methods="fl")
    once = search(made, settings).plans[0]
    settings.aggregation.every = "2 steps"
    often = search(made, settings).plans[0]
    assert often.plan.aggregate_every == 2
    weights_s = StageCosts(made).weight_bytes(0, 5) * 8 * (1 / 10e6 + 1 / 25e6)
    assert often.epoch_s - once.epoch_s == pytest.approx(4 * weights_s, rel=0.05)


def test_weights_that_are_coded_to_be_averaged_take_less_of_a_federated_round():
    made = profile(device("4g", 2.0))
    whole = search(made, config(methods="fl")).plans[0].round
    half = search(dataclasses.replace(made, weight_ratio=0.5), config(methods="fl")).plans[0].round
    assert half.carried_bytes["d0", "server"] == whole.carried_bytes["d0", "server"] / 2
    assert half.seconds < whole.seconds


def test_what_binds_is_the_busiest_resource():
    made = profile(device("4g", 1.0))
    judged = estimate(StageCosts(made), Plan((DeviceOption(1, 5).device_plan(),)))
    busy = loads(StageCosts(made), judged)
    assert max(busy, key=busy.get) == "uplink"
    assert 0.8 < busy["uplink"] <= 1.0


def test_the_front_door_predicts_a_round_as_a_trace():
    made = profile(device("wifi", 2.0))
    plan = pipar_jax.tune(made, config())
    trace = pipar_jax.simulate(plan, made)
    assert trace.rounds[0].seconds == pytest.approx(estimate(StageCosts(made), plan).round.seconds)


def test_twenty_devices_and_a_deep_network_take_seconds(within):
    made = profile(*[device("wifi", 10.0, 1000, units=36)] * 20, units=36)
    with within(5.0, time.process_time):
        found = search(made, config(20))
    assert found.gap < 0.1
