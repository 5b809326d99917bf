"""Plans print, compare, serialise and refuse what cannot be."""

from __future__ import annotations

import json

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods import registry
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import (
    Codecs,
    DevicePlan,
    Dispatch,
    HandOn,
    Order,
    Plan,
    WeightPolicy,
)

UNITS = ("stem", "block1", "block2", "head")


def test_a_plan_survives_json():
    one = Plan(
        (
            DevicePlan((1,), ("device", "server"), 4, (Codecs("int8", "bfloat16"),)),
            DevicePlan((1, 2), ("device", "n1", "device"), 2),
        ),
        dispatch="backward_first",
        aggregate_every=3,
    )
    assert Plan.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("field", "words"),
    [("order", Order), ("weights", WeightPolicy), ("dispatch", Dispatch), ("hand_on", HandOn)],
)
def test_the_words_of_a_plan_are_an_enumeration_and_read_as_before(field, words):
    one = DevicePlan((), ("device",))
    for word in words:
        plan = Plan((one,), **{field: str(word)})
        assert type(getattr(plan, field)) is words
        text = json.dumps(plan.to_dict())
        assert f'"{field}": "{word.value}"' in text and f"{word}" == word.value
        assert type(getattr(Plan.from_dict(json.loads(text)), field)) is words


def test_a_plan_knows_its_hosts_and_units():
    one = Plan((DevicePlan((1, 3), ("device", "n1", "device")),) * 2)
    assert one.hosts() == ("server", "d0", "d1", "n1")
    assert [list(one.units(0, s, 4)) for s in range(3)] == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuts": (1,), "hosts": ("device",)}, "names 1 hosts"),
        ({"cuts": (2, 1), "hosts": ("device", "a", "b")}, "strictly increasing"),
        ({"cuts": (0,), "hosts": ("device", "server")}, "must be positive"),
        ({"cuts": (), "hosts": ("device",), "micro_batches": 0}, "at least one micro-batch"),
        ({"cuts": (1,), "hosts": ("device", "server"), "codecs": (Codecs(),) * 2}, "codec pairs"),
    ],
)
def test_an_impossible_device_plan_is_refused(values, message):
    with pytest.raises(PlanError, match=message):
        DevicePlan(**values)


def test_an_impossible_plan_is_refused():
    one = DevicePlan((), ("device",))
    with pytest.raises(PlanError, match="at least one device"):
        Plan(())
    with pytest.raises(PlanError, match="is not one of"):
        Plan((one,), order="random")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_dict({"devices": [{}]})


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("fl", "2 of device; copy weights; fcfs; averaged each epoch"),
        ("sl", "2 of device|2|server x1; shared weights; fcfs; sequential, handed on each epoch"),
        ("sfl", "2 of device|2|server x1; copy weights; fcfs; averaged each epoch"),
        ("pipar", "2 of device|2|server x4; copy weights; fcfs; averaged each epoch"),
    ],
)
def test_a_method_is_a_plan(method, text):
    config = Config(method=method)
    config.pipeline.cut = "block1"
    assert str(registry.plan_for(resolve(config, models=(config.model.name,)), UNITS)) == text


@pytest.mark.parametrize("cut", [4, 9, "blok1"])
def test_a_cut_that_does_not_exist_is_named_with_those_that_do(cut):
    config = Config()
    config.pipeline.cut = cut
    with pytest.raises(ConfigError, match=r"cuts: 1 stem, 2 block1, 3 block2"):
        registry.plan_for(resolve(config, models=(config.model.name,)), UNITS)


def test_devices_have_plans_of_their_own():
    config = Config()
    config.devices.overrides = {1: {"cut": 3, "micro_batches": 7}}
    made = registry.plan_for(resolve(config, models=(config.model.name,)), UNITS)
    assert [(one.cuts, one.micro_batches) for one in made.devices] == [((1,), 4), ((3,), 7)]
