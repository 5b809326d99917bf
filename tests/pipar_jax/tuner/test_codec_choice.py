"""Codecs by need: on slow links alone, no coarser than allowed, no finer than is free."""

from __future__ import annotations

import dataclasses

import pytest

from comms import parse_codec
from pipar_jax.config import Config, codec_candidates
from pipar_jax.config.codec_candidates import (
    CONVOLUTIONAL,
    ROLES,
    CodecCandidates,
    bit_widths,
    candidates_of,
)
from pipar_jax.cost_model.profile import CodecProfile
from pipar_jax.errors import ConfigError
from pipar_jax.profiling.codec_times import measure_codecs
from pipar_jax.simulator.predict import estimate
from pipar_jax.tuner import StageCosts, codec_choice, search
from stages.names import MODELS
from tests.pipar_jax.tuner.profiles import bit_codecs, config, device, profile


def chosen(found) -> list[tuple[str, str]]:
    chains = found.plans[0].plan.devices
    return [(one.codecs[0].activation, one.codecs[0].cotangent) for one in chains]


def candidates(made: Config) -> CodecCandidates:
    return CodecCandidates(made.tuner, made.pipeline)


def bits(name: str) -> int:
    if name == "raw":
        return 32
    codec, parameter = parse_codec(name)
    return codec.precision_bits(parameter)


def auto(count: int, **values):
    return config(count, **({"methods": "pipar", "codecs": "auto"} | values))


@pytest.mark.parametrize("floors", [(4, 8), (6, 12)])
def test_a_slow_link_gets_bits_that_the_floors_allow(floors):
    made = profile(device("4g", 1.0), codecs=bit_codecs())
    settings = auto(1, activation_bits=floors[0], cotangent_bits=floors[1])
    found = search(made, settings)
    ((activation, cotangent),) = chosen(found)
    assert "raw" not in (activation, cotangent)
    assert bits(activation) >= floors[0] and bits(cotangent) >= floors[1]
    assert found.plans[0].epoch_s < search(made, auto(1, codecs="raw")).plans[0].epoch_s


def test_a_fast_link_goes_without_and_the_reason_is_told():
    made = profile(device("none", 3.0), codecs=bit_codecs())
    settings = auto(1)
    found = search(made, settings)
    assert chosen(found) == [("raw", "raw")]
    told = codec_choice.reasons(StageCosts(made), candidates(settings), found.plans[0])
    assert [one.slot.role for one in told] == ["activation", "cotangent"]
    for one in told:
        assert one.coding_s > one.saved_s
        assert one.words().startswith("off: the link is faster than the codec")


def test_each_link_gets_its_own():
    made = profile(device("4g", 3.0), device("none", 3.0), codecs=bit_codecs())
    slow, fast = chosen(search(made, auto(2)))
    assert "raw" not in slow and fast == ("raw", "raw")
    settings = auto(2)
    told = codec_choice.reasons(
        StageCosts(made), candidates(settings), search(made, settings).plans[0]
    )
    words = {one.slot: one.words().split(":")[0] for one in told}
    assert {(slot.devices, way) for slot, way in words.items()} == {((0,), "on"), ((1,), "off")}
    on = next(one for one in told if one.chosen != "raw")
    assert on.saved_s > on.coding_s and on.other_s > on.epoch_s


@pytest.mark.parametrize("link", ["4g", "wifi", "lan"])
def test_no_slot_could_have_more_bits_for_nothing_nor_needed_as_many(link):
    made, settings = profile(device(link, 3.0), codecs=bit_codecs()), auto(1)
    found = search(made, settings)
    stages, plan = StageCosts(made), found.plans[0].plan
    fastest_s = min(one.epoch_s for one in found.plans)
    limit_s = fastest_s * (1 + codec_choice.SLACK)
    assert found.plans[0].epoch_s <= limit_s
    for slot in codec_choice.slots(plan, made):
        rungs = codec_candidates.bit_widths(settings.tuner, slot.role)
        at = rungs.index(slot.codec(plan))
        if at + 1 < len(rungs):
            assert estimate(stages, slot.with_codec(plan, rungs[at + 1])).epoch_s > limit_s


def test_a_list_is_kept_to_but_for_what_is_too_coarse():
    settings = config(1, codecs="raw, int4, int8")
    pairs = {(one.activation, one.cotangent) for one in candidates(settings).pairs()}
    assert pairs == {(a, c) for a in ("raw", "int4", "int8") for c in ("raw", "int8")}
    with pytest.raises(ConfigError, match=r"cotangents, which need at least 8 bits \(int4: 4\)"):
        candidates(config(1, codecs="int4")).pairs()
    # What is configured is not the tuner's to judge, and a bound is the user's own.
    assert len(candidates(config(1, codecs="")).pairs()) == 1
    assert len(candidates(config(1, codecs="bits:abs0.1")).pairs()) == 1


def test_of_a_list_what_is_as_fast_without_goes_raw():
    free = {"float16": CodecProfile(0.5, 0.0, 0.0)}
    listed = {"methods": "pipar", "codecs": "float16, raw"}
    fast = search(profile(device("none", 3.0), codecs=free), config(1, **listed))
    assert chosen(fast) == [("raw", "raw")]
    slow = search(profile(device("4g", 3.0), codecs=free), config(1, **listed))
    assert chosen(slow) == [("float16", "float16")]


def test_what_may_be_chosen_is_measured():
    settings = auto(1, activation_bits=12, cotangent_bits=16)
    measured = measure_codecs(candidates(settings), "raw")
    assert set(measured) == {"bits:11", "bits:15", "bits:23"}
    assert measured["bits:11"].ratio < measured["bits:15"].ratio < measured["bits:23"].ratio < 1


def known(link: str, **values):
    """A profile of the network with which codecs were measured."""
    made = profile(device(link, 1.0), **({"codecs": bit_codecs()} | values))
    return dataclasses.replace(made, model="vgg5")


def test_unless_told_otherwise_a_slow_link_gets_as_many_bits_as_trials_allow():
    made, settings = known("4g"), config(1, methods="pipar")
    found = search(made, settings)
    ((activation, cotangent),) = chosen(found)
    assert "raw" not in (activation, cotangent)
    assert min(bits(activation), bits(cotangent)) >= codec_candidates.SAFE_BITS
    raw = search(made, config(1, methods="pipar", codecs="raw"))
    assert chosen(raw) == [("raw", "raw")]
    assert found.plans[0].epoch_s < raw.plans[0].epoch_s
    fewer = search(made, auto(1))  # down to 4 and 8 bits, and no longer as exact as in the trials
    assert fewer.plans[0].epoch_s <= found.plans[0].epoch_s
    fast = search(known("none"), settings)
    assert chosen(fast) == [("raw", "raw")]


def test_a_profile_without_codecs_is_planned_without():
    made, settings = known("4g", codecs={}), config(1, methods="pipar")
    assert chosen(search(made, settings)) == [("raw", "raw")]
    assert "no times of bits:K" in codec_choice.candidates_for(settings, made).words()
    with pytest.raises(ConfigError, match="the profile does not have it"):
        search(made, auto(1))


def changed(**values) -> Config:
    made = Config(method="auto")
    for path, value in values.items():
        group, _, name = path.rpartition("__")
        setattr(getattr(made, group) if group else made, name, value)
    return made


#: What keeps codecs out by default: changes of the configuration, and words that name it.
OBJECTIONS = [
    ({"method": "pipar"}, "method=pipar"),
    ({"method": "mpsl"}, "method=mpsl"),
    ({"tuner__select": "paper"}, "paper's formulas"),
    ({"pipeline__activation_codec": "float16"}, "set to float16 and raw"),
    ({"pipeline__cotangent_codec": "int8"}, "set to raw and int8"),
    ({"model__dtype": "bfloat16"}, "model.dtype=bfloat16"),
    ({"task__name": "regression"}, "classify images"),
    ({"model__trainable": "head"}, "only some weights"),
    ({"lora__match": "head"}, "only some weights"),
]


@pytest.mark.parametrize(("change", "words"), OBJECTIONS)
def test_without_evidence_codecs_stay_as_configured_and_the_reason_is_told(change, words):
    made = changed(**change)
    held = candidates_of(made, "vgg5")
    assert not held.chosen and held.names() == []
    assert held.pairs() == [codec_candidates.configured(made.pipeline)]
    assert words in held.words() and "tuner.codecs=auto" in held.words()
    asked = candidates_of(changed(**change, tuner__codecs="auto"), "vgg5")
    assert asked.chosen and not asked.words()


@pytest.mark.parametrize("network", [*MODELS, "mine"])
def test_networks_unlike_the_measured_one_go_raw_and_like_ones_say_so(network):
    held = candidates_of(changed(), network)
    assert held.chosen == (network in CONVOLUTIONAL)
    assert ("vgg5" in network) == (network not in held.words() and held.chosen)
    assert not candidates_of(changed(tuner__codecs="raw"), network).words()


def test_the_bits_of_safe_codecs_are_those_of_the_trials_whatever_the_floors_are():
    for role in ROLES:
        widths = bit_widths(changed().tuner, role)
        assert [bits(name) for name in widths] == [8, 10, 12, 16, 24, 32]
