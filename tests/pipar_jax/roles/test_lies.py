"""No number that a member says, in whatever message, ends more than that member's part.

The messages and their numbers are those of the registry (``lies``). What hosts say in rounds is
told in whole runs too (``test_others_go_on``); here, and in ``test_lies_in_rounds``, each lie goes
to the one that reckons with it.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import (
    NO_HANDLING,
    DeviceProfile,
    HostProfile,
    Profile,
    UnitFacts,
)
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.kept_times import Measured
from pipar_jax.profiling.predictor.operators import Tables
from pipar_jax.profiling.predictor.predict_host import predict_host
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import DirectTiming, Seen, Timing
from pipar_jax.roles import adaptation, plan_choice, survey
from pipar_jax.roles.mail import Mail
from pipar_jax.roles.survey import Surveyed
from pipar_jax.runtime.observations import Observer
from pipar_jax.schedule.plan import COORDINATOR, Boundary, Plan
from pipar_jax.tuner.bounds import DeviceOption
from tests.pipar_jax.profiling.predictor.test_predict_host import reference
from tests.pipar_jax.roles import fakes, lies
from tests.pipar_jax.roles import test_fuzz as fuzz
from tests.pipar_jax.runtime import support

SAMPLES, SIZES = (14, 14, 14), (2, 7)
LIAR = 1


# --- what hosts show before a run -----------------------------------------------------------------


def profiled():
    """What an honest host says of the network's units."""
    names = fuzz.network().unit_names
    table = ((1e-3, 3e-3),) * len(names)
    host = HostProfile(SIZES, table, table, (1e-4,) * len(names), 1e-5, 1e-9, 1e9, NO_HANDLING,
                       ((1e-5, 1e-5, 1e-5),) * len(names))  # fmt: skip
    facts = tuple(UnitFacts(name, 4e3, 0.0, 4e3, 256.0, 512.0) for name in names)
    return messages.Profiled(host, facts, 0.5)


def referenced():
    """What an honest host says of the reference layers."""
    made = reference()
    fields = {one.name: getattr(made, one.name) for one in dataclasses.fields(made)}
    return messages.Referenced(**fields, memory_bytes=1e9)


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed: the server is as fast as all others, and no link takes long."""
    said = profiled()
    monkeypatch.setattr(
        survey, "measure_host", lambda *_: Measured(said.host, said.units, said.seconds)
    )
    monkeypatch.setattr(survey, "measure_reference", lambda *_: reference())
    monkeypatch.setattr(survey, "measure_codecs", lambda *_: {})
    monkeypatch.setattr(survey, "measure_message_s", lambda: 1e-4)
    monkeypatch.setattr(survey, "two_bundles", lambda nbytes: ({}, {}))
    tables = Tables(fuzz.network())  # traced once

    def predicted(config, model, sizes, times):
        return Measured(predict_host(model, sizes, times, tables=tables), said.units, 0.0)

    monkeypatch.setattr(survey, "predicted_host", predicted)


def settings(folder, method, **tuner):
    made = support.config(folder, SAMPLES, dtype="float32", method=method)
    made.cohort.quorum = 1
    made.tuner.sizes, made.tuner.methods, made.tuner.codecs = "2,7", "fl,sfl,pipar,sl", "raw"
    made.tuner.micro_batches = "2"
    if method == "mpsl":
        made.aggregation.every = "epoch"
        made.nodes.count, made.nodes.replicate_every, made.pipeline.cuts = 2, 1, ""
        made.pipeline.micro_batches = 2
    for name, value in tuner.items():
        setattr(made.tuner, name, value)
    return resolve(made)


#: A method and what the tuner does, and which host lies in which answers.
SURVEYS = {
    "auto": ("auto", {}, "d1", (messages.Profiled, messages.Took)),
    "paper": ("auto", {"select": "paper"}, "d1", (messages.Profiled,)),
    "predicted": ("auto", {"times": "predicted"}, "d1", (messages.Referenced,)),
    "chain": ("mpsl", {}, "d1", (messages.Profiled, messages.Took)),
    "node": ("mpsl", {}, "n1", (messages.Profiled,)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("which", SURVEYS)
def test_no_number_of_a_survey_costs_others_the_run(tmp_path, quick, which):
    method, tuner, liar, kinds = SURVEYS[which]
    made, network = settings(tmp_path, method, **tuner), fuzz.network()
    honest = {messages.Profiled: profiled(), messages.Referenced: referenced(),
              messages.Took: messages.Took(1e-3)}  # fmt: skip
    told = 0
    for kind in kinds:
        for path, value in lies.all_lies(kind):
            lie = lies.told(honest[kind], path, value)
            if lie is None:
                continue
            told += 1
            says = dict.fromkeys((*hosts_of(made).nodes, *hosts_of(made).devices), honest)
            members = lies.Members(made, {**says, liar: {**honest, kind: lie}})
            plan, found = plan_choice.choose_plan(made, network, members, SAMPLES)
            assert members.gone.keys() <= {liar}, (path, value, members.gone)
            assert len(plan.devices) == len(SAMPLES)
            (tuned,) = members.events
            assert 0 < tuned["epoch_s"] < math.inf, (path, value)
            assert all(one.samples == 14 for one in found.profile.devices)
    assert told > 5


def test_a_device_that_has_room_for_no_plan_goes_alone(tmp_path, quick):
    made = settings(tmp_path, "auto")
    honest = {messages.Profiled: profiled(), messages.Took: messages.Took(1e-3)}
    lie = lies.told(honest[messages.Profiled], ("host", "memory_bytes"), 1.0)
    says = {"d0": honest, "d1": {**honest, messages.Profiled: lie}, "d2": honest}
    members = lies.Members(made, says)
    plan_choice.choose_plan(made, fuzz.network(), members, SAMPLES)
    assert members.gone.keys() == {"d1"}
    assert str(members.gone["d1"]).startswith("device 1 says that it has 1e-06 MB of memory")


# --- what hosts see in a run that adapts ----------------------------------------------------------


def looks(learns):
    """What adapts a run of two devices, and what an honest device has seen."""
    network, plan = fuzz.network(), Plan((DeviceOption(1, 2).device_plan(),) * 2)
    made = support.config("/nowhere", SAMPLES[:2], dtype="float32")
    made.tuner.adapt, made.tuner.sizes, made.tuner.methods = True, "2,7", "fl,sfl,pipar"
    made.tuner.codecs, made.tuner.micro_batches = "raw", "2"
    times = {f"d{index}": reference() for index in range(2)} if learns else {}
    members = lies.Members(resolve(made), {})
    members.by_name = {f"d{index}": SimpleNamespace(link=fakes.Link("")) for index in range(2)}
    adapts = adaptation.Adaptation(
        resolve(made), network, Surveyed(profile_of(2), times), plan, 9, members,
        SimpleNamespace(observer=Observer(), prepare_ahead=members.nothing),
    )  # fmt: skip
    rows = tuple(Seen(LIAR, 0, kind, size, 3, 2e-3) for kind in "FB" for size in (3, 4))
    boundary = Boundary("d1", COORDINATOR, 0)
    return adapts, members, plan, messages.LookSeen(
        0, (*rows, Seen(LIAR, 0, "U", 0, 3, 1e-3)), Timing(1 << 20, 1.0),
        (DirectTiming(boundary, Timing(1 << 20, 1.0)),),
    )  # fmt: skip


def profile_of(devices):
    link, host = LinkModel(1e6, 1e-3, 1e-4), profiled().host
    return Profile(
        "mlp", 7, profiled().units, host, (DeviceProfile(host, 14, link, link),) * devices
    )


@pytest.mark.parametrize("learns", [False, True], ids=["factors", "learned"])
def test_no_number_that_a_host_has_seen_ends_the_looks(learns):
    """Each is told twice and then another one: what is learned may not run away."""
    adapts, members, plan, honest = looks(learns)
    for path, value in lies.all_lies(messages.LookSeen):
        if (lie := lies.told(honest, path, value)) is None or path == ("look",):
            continue
        for said in (lie, lie, honest):
            members.gone.clear()
            members.by_name["d1"] = SimpleNamespace(link=fakes.Link(""))
            members.listeners[messages.LookSeen](Mail("d1", said, {}, 0.0))
            if members.gone:
                assert said is lie and "d1" in members.gone
                continue
            other = dataclasses.replace(honest, rows=(), direct=())
            look = adaptation._Look(0, plan, {"d0": other, "d1": said}, [])
            adapts._learn(look)
            adapts._consider(0)
            assert all(map(math.isfinite, adapts._watch.state())), (path, value)


def test_durations_that_leave_the_range_of_numbers_are_learned_within_it():
    """A pace that changes by more than numbers can tell made all times infinite."""
    adapts, _, plan, honest = looks(True)
    for median_s in (lies.TINY, 1e9, 1e-8, 1e9, lies.TINY):
        rows = tuple(row._replace(median_s=median_s) for row in honest.rows)
        said = dataclasses.replace(honest, rows=rows)
        adapts._learn(adaptation._Look(0, plan, {"d0": honest, "d1": said}, []))
        adapts._consider(0)
        assert all(map(math.isfinite, adapts._watch.state()))


@pytest.mark.parametrize(
    "row",
    [
        Seen(LIAR, 0, "F", 5, 1, 1e-3),
        Seen(LIAR, 0, "F", 0, 1, 1e-3),
        Seen(LIAR, 0, "U", 4, 1, 1e-3),
        Seen(LIAR, 0, "F", 4, 9, 2e-3),
        Seen(0, 0, "F", 4, 1, 1e-3),
        Seen(LIAR, 1, "L", 4, 1, 1e-3),
    ],
)
def test_what_a_host_cannot_have_computed_ends_its_part(row):
    """Of numbers of samples that no micro-batch has there are millions, and each would be kept."""
    _, members, _, honest = looks(False)
    members.listeners[messages.LookSeen](Mail("d1", honest, {}, 0.0))
    assert not members.gone
    rows = (*honest.rows, row)
    members.listeners[messages.LookSeen](
        Mail("d1", dataclasses.replace(honest, rows=rows), {}, 0.0)
    )
    assert members.gone.keys() == {"d1"}
