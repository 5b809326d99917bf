"""Codecs in chains: on where a boundary's link is slow, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time

import pytest

from pipar_jax.config import Config, codec_candidates
from pipar_jax.config.codec_candidates import CodecCandidates
from pipar_jax.errors import ConfigError
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import OWNER, Codecs
from pipar_jax.simulator.predict import estimate
from pipar_jax.tuner import StageCosts, chains, codec_choice
from pipar_jax.tuner.chain_search import plan_chain
from tests.pipar_jax.tuner.profiles import bit_codecs, device, node, profile
from tests.pipar_jax.tuner.test_codec_choice import bits

UNITS = 10


def settings(devices: int = 1, nodes: int = 2, method: str = "accept", **tuner) -> Config:
    made = Config(method=method)
    made.devices.count, made.nodes.count = devices, nodes
    made.pipeline.micro_batches = 4
    for name, value in ({"codecs": "auto"} | tuner).items():
        setattr(made.tuner, name, value)
    return resolve(made)


def made_of(first: str, *links: str, devices: int = 1, slower: float = 8.0, units: int = UNITS):
    """A slow device behind a link, and faster and faster nodes with links of theirs."""
    owners = [device(first, slower, units=units) for _ in range(devices)]
    nodes = tuple(node(link, 4.0 / 2**i, units=units) for i, link in enumerate(links))
    return profile(*owners, units=units, codecs=bit_codecs(), nodes=nodes)


def told(made, config, found):
    """For each boundary and role, whether the tensor is coded, and the reason."""
    why = codec_choice.reasons(
        StageCosts(made), CodecCandidates(config.tuner, config.pipeline), found
    )
    return {(one.slot.boundary, one.slot.role): one.words() for one in why}


def test_on_fast_links_a_chain_goes_without_and_the_reason_is_told():
    made, config = made_of("none", "none", "none"), settings()
    found = chains.tune_chain(made, config)
    assert set(found.plan.devices[0].codecs) == {Codecs()}
    words = told(made, config, found)
    assert len(words) == 2 * len(found.plan.devices[0].cuts) >= 4
    assert all(text.startswith("off: the link is faster than the codec") for text in words.values())


def with_codecs(stages, config, judged, plan):
    """A chain with the best codecs, whatever that simulates."""
    candidates = CodecCandidates(config.tuner, config.pipeline)
    make = functools.partial(plan_of_chain, config)
    return chains.with_codecs(stages, candidates, make, config.tuner.actions, judged, plan)


@pytest.mark.parametrize(
    ("links", "slow"),
    [(("2/2", "none", "none"), 0), (("none", "2/2", "none"), 1), (("none", "none", "2/2"), 2)],
)
def test_only_the_slow_link_of_a_chain_is_coded(links, slow):
    """Three nodes in a fixed place each, so that none can be left out or moved."""
    made, config = made_of(*links, "none"), settings(nodes=3)
    cuts, hosts = (2, 4, 6), (OWNER, "n1", "n2", "n3")
    stages, judged = StageCosts(made), {}
    plan = plan_of_chain(config, cuts, hosts)
    judged[plan] = estimate(stages, plan)
    found = with_codecs(stages, config, judged, plan)
    assert found.epoch_s < judged[plan].epoch_s
    words = told(made, config, found)
    assert {where: text[:3] for where, text in words.items()} == {
        (boundary, role): "on:" if boundary == slow else "off"
        for boundary in range(3)
        for role in codec_candidates.ROLES
    }


@pytest.mark.parametrize("method", ["accept", "mpsl"])
@pytest.mark.parametrize("floors", [(4, 8), (6, 12)])
def test_a_chain_keeps_to_the_floors(method, floors):
    made = made_of("4g", "none", "none")
    config = settings(method=method, activation_bits=floors[0], cotangent_bits=floors[1])
    found = chains.tune_chain(made, config)
    codecs = found.plan.devices[0].codecs
    assert "raw" not in (codecs[0].activation, codecs[0].cotangent)
    for pair in codecs:
        assert bits(pair.activation) >= floors[0] and bits(pair.cotangent) >= floors[1]
    raw = chains.tune_chain(made, settings(method=method, codecs="raw"))
    assert found.epoch_s < 0.6 * raw.epoch_s


def test_devices_with_other_links_get_other_codecs_but_share_those_between_nodes():
    """MP-SL: a slow and a fast device on one chain, whose nodes are behind a slow link."""
    slow, fast = (device(link, 8.0, units=UNITS) for link in ("1/1", "none"))
    nodes = (node("2/2", 4.0, units=UNITS), node("2/2", 4.0, units=UNITS))
    made = profile(slow, fast, slow, units=UNITS, codecs=bit_codecs(), nodes=nodes)
    config = settings(3, 2, "mpsl")
    stages, plan = StageCosts(made), plan_of_chain(config, (2, 6, 9), (OWNER, "n1", "n2", OWNER))
    slots = list(codec_choice.slots(plan, made))
    groups = {(slot.boundary, slot.devices) for slot in slots}
    assert groups == {(0, (0, 2)), (0, (1,)), (1, (0, 1, 2)), (2, (0, 2)), (2, (1,))}
    ends = {(slot.role, slot.ends(plan, 1)) for slot in slots if slot.boundary == 2}
    assert ends == {("activation", ("n2", "d1")), ("cotangent", ("d1", "n2"))}
    found = with_codecs(stages, config, {plan: estimate(stages, plan)}, plan)
    first, second, third = found.plan.devices
    assert first == third != second
    assert "raw" not in (first.codecs[0].activation, first.codecs[0].cotangent)
    assert second.codecs[0] == second.codecs[2] == Codecs()
    assert first.codecs[1] == second.codecs[1] != Codecs()


@pytest.mark.parametrize("links", [("4g", "wifi"), ("wifi", "4g"), ("lan", "lan")])
def test_no_tensor_of_a_chain_could_have_more_bits_for_nothing(links):
    made, config = made_of(*links, "none"), settings()
    stages = StageCosts(made)
    coarsest = Codecs(
        *(codec_candidates.bit_widths(config.tuner, role)[0] for role in codec_candidates.ROLES)
    )
    plan = plan_of_chain(config, (2, 6), (OWNER, "n1", "n2"), (coarsest,) * 2)
    limit_s = estimate(stages, plan).epoch_s * (1 + codec_choice.SLACK)
    slots = list(codec_choice.slots(plan, made))
    sharp = codec_choice.raise_precision(
        plan,
        slots,
        CodecCandidates(config.tuner, config.pipeline),
        lambda one: estimate(stages, one).epoch_s,
    )
    assert estimate(stages, sharp).epoch_s <= limit_s
    assert sharp != plan
    for slot in slots:
        rungs = codec_candidates.bit_widths(config.tuner, slot.role)
        at = rungs.index(slot.codec(sharp))
        if at + 1 < len(rungs):
            assert estimate(stages, slot.with_codec(sharp, rungs[at + 1])).epoch_s > limit_s


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "links", [("4g", "none"), ("none", "4g"), ("wifi", "wifi"), ("lan", "lan"), ("none", "none")]
)
def test_no_chain_with_any_codecs_is_faster(links):
    """Every chain over two nodes, with each pair of codecs at each boundary, simulated."""
    made, config = made_of(*links, "none", units=5), settings()
    stages, pairs = StageCosts(made), CodecCandidates(config.tuner, config.pipeline).pairs()
    assert len(pairs) == 4
    best_s = min(
        estimate(stages, plan_of_chain(config, cuts, (OWNER, *nodes), codecs)).epoch_s
        for count in (1, 2)
        for cuts in itertools.combinations(range(1, 5), count)
        for nodes in itertools.permutations(("n1", "n2"), count)
        for codecs in itertools.product(pairs, repeat=count)
    )
    found = chains.tune_chain(made, config)
    assert best_s * (1 - 1e-9) <= found.epoch_s <= best_s * (1 + codec_choice.SLACK)


def test_of_a_list_a_chain_takes_what_is_fastest_and_raw_where_that_is_as_fast():
    made = dataclasses.replace(
        made_of("4g", "none", "none"),
        codecs={name: made for name, made in bit_codecs().items() if name in ("bits:7", "bits:15")},
    )
    config = settings(codecs="raw, bits:7, bits:15")
    codecs = chains.tune_chain(made, config).plan.devices[0].codecs
    assert codecs[0] == Codecs("bits:7", "bits:7")
    assert set(codecs[1:]) == {Codecs()}
    with pytest.raises(ConfigError, match=r"int8 may be used .* it has raw, bits:7, bits:15"):
        chains.tune_chain(made, settings(codecs="raw, int8"))


def test_the_published_objective_knows_no_codecs_but_those_configured():
    made = made_of("4g", "none", "none")
    found = chains.tune_chain(made, settings(select="paper"))
    assert set(found.plan.devices[0].codecs) == {Codecs()}
    configured = settings(codecs="")
    configured.pipeline.activation_codec = "bits:5"
    found = chains.tune_chain(made, configured)
    assert set(found.plan.devices[0].codecs) == {Codecs("bits:5", "raw")}


def test_planning_a_chain_with_codecs_takes_milliseconds(monkeypatch, quiet):
    links, took = ("wifi", "4g", "lan", "none", "wifi", "4g+"), []

    def timed(*args):
        began_s = time.thread_time()
        try:
            return plan_chain(*args)
        finally:
            took.append(time.thread_time() - began_s)

    monkeypatch.setattr(chains, "plan_chain", timed)
    chains.tune_chain(made_of("4g", *links, devices=4), settings(4, 6, "mpsl"))
    assert len(took) >= 16 * len(chains.OBJECTIVES)
    assert not quiet or sum(took) / len(took) < 0.1  # processor time; the usual is 6 ms
