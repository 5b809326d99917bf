"""No number of a join, an answer, a score or a ledger ends more than its member's part."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest

from pipar_jax.errors import PeerError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.messages import Evaluated
from pipar_jax.protocol.values import Memory
from pipar_jax.protocol.wire_fields import struct
from pipar_jax.roles import admission
from pipar_jax.roles.federated_evaluation import evaluate_on_devices
from pipar_jax.roles.gathering import Gathering
from pipar_jax.roles.population import Population
from pipar_jax.roles.private_rounds import PrivateRounds
from pipar_jax.roles.replies import answers, reply
from pipar_jax.roles.timetable import Timetable
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import Plan
from pipar_jax.tuner.bounds import DeviceOption
from stages.tasks.registered import classification, language, regression
from tests.pipar_jax.roles import fakes, lies
from tests.pipar_jax.roles import test_fuzz as fuzz
from tests.pipar_jax.roles.test_lies import LIAR, SAMPLES, SURVEYS
from tests.pipar_jax.runtime import support

# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [classification(), regression(), language()], ids=lambda task: task.name
)
def test_no_score_of_a_device_leaves_the_others_without(tmp_path, task):
    made = resolve(support.config(tmp_path, SAMPLES))
    honest = Evaluated(0, 3.0, 4, {name: (2.0, 4.0) for name in task.streamed})
    aggregator = SimpleNamespace(params={}, state={}, rule_state={})
    names = [f"d{index}" for index in range(3)]
    for path, value in lies.all_lies(Evaluated):
        for zero in (False, True):
            lie = lies.told(honest, path, value)
            if zero and lie is not None and path[0] == "metrics" and path[-1] == 0:
                lie = lies.told(lie, (*path[:-1], 1), 0.0)  # without weight
            if lie is None:
                continue
            says = {name: {Evaluated: honest} for name in names}
            members = lies.Members(made, {**says, "d1": {Evaluated: lie}})
            found = evaluate_on_devices(members, names, aggregator, task, 0, 1000)
            assert members.gone.keys() <= {"d1"}
            assert {0, 2} <= found.by_device.keys()
            assert found.by_device.keys() == {0, 1, 2} - {1 for _ in members.gone}
            assert found.overall.metrics.keys() == honest.metrics.keys()


def test_a_sum_without_weight_is_refused_and_one_that_outweighs_all(tmp_path):
    task, made = regression(), resolve(support.config(tmp_path, SAMPLES))
    for samples, sums in ((4, (-1e9, 0.0)), (4, (1.0, math.inf)), (1001, (2.0, 4.0))):
        says = {
            "d0": {Evaluated: Evaluated(0, 3.0, 4, dict.fromkeys(task.streamed, (2.0, 4.0)))},
            "d1": {Evaluated: Evaluated(0, 3.0, samples, dict.fromkeys(task.streamed, sums))},
        }
        members = lies.Members(made, says)
        aggregator = SimpleNamespace(params={}, state={}, rule_state={})
        found = evaluate_on_devices(members, list(says), aggregator, task, 0, 1000)
        assert members.gone.keys() == {"d1"}
        assert found.overall.metrics["rmse"] == pytest.approx(0.5**0.5)


# --- ledgers --------------------------------------------------------------------------------------


def private(folder):
    """A private run of three devices that may be lost, before its second round."""
    made = support.config(folder, SAMPLES, dtype="float32", method="fl")
    made.epochs, made.aggregation.every, made.cohort.quorum = 4, "epoch", 1
    made.privacy.epsilon, made.privacy.unit, made.privacy.update_clip = 8.0, "user", 0.5
    made.aggregation.weighted = False
    made = resolve(made)
    plan = Plan((DeviceOption(0).device_plan(),) * 3)
    population = Population()
    for index in range(3):
        population.join(admission.Identity(f"d{index}", 14, 2), 0.0)
        population[index].ready = True
    table = Timetable(4, 0, plan, (2, 2, 2))
    return made, PrivateRounds(made, plan, population, table)


def test_no_number_of_a_ledger_ends_the_run_of_others(tmp_path):
    stored = messages.Stored(0, 0, 0.0, Memory(0, 0, 0), 0.0, 0, {})
    for path, value in lies.all_lies(messages.Stored):
        if path[0] not in ("spent", "epsilon", "within"):
            continue
        made, rounds = private(tmp_path)
        ready = [f"d{index}" for index in range(3)]
        members = lies.Members(made, {}, ready=ready)
        said = dict.fromkeys(ready, stored) | {"d1": lies.told(stored, path, value)}
        rounds.ended(said, ready)
        spans = [Span(place, 2, 4) for place in range(3)]
        spent = rounds.exhausted(1, (0, 1, 2), (0, 1, 2), spans)
        assert spent.keys() <= {"d1"}
        assert bool(spent) == (path == ("spent",) and value == 1e300), (path, value)
        if spent:
            assert Gathering(made, members).go_on_without(spent)
            assert members.gone.keys() == {"d1"}
            assert not rounds.exhausted(1, (0, 2), (0, 1), [Span(0, 2, 4), Span(1, 2, 4)])
            back = admission.Identity("d1", 14, 2)
            assert "budget is spent" in rounds.admit(back)


def test_a_ledger_that_lacks_what_was_released_names_its_device_alone(tmp_path):
    _, rounds = private(tmp_path)
    present = [admission.Identity(f"d{index}", 14, 2, spent=0.5) for index in range(3)]
    present[LIAR] = dataclasses.replace(present[LIAR], spent=0.0)
    facts = {"spent": {f"d{index}": 0.5 for index in range(3)}, "clip": 0.0}
    assert rounds.begin(facts, present).keys() == {"d1"}


# --- joins, and answers that only have to be in their turn ----------------------------------------


def joins():
    made = fuzz.config("mpsl")
    return (
        admission.device_join(made, "d0", fuzz.loader(0), fuzz.network()),
        admission.node_join(made, "n1", ("127.0.0.1", 7000)),
    )


@pytest.mark.parametrize("join", joins(), ids=lambda join: join.name)
def test_no_number_of_a_join_is_more_than_refused(join):
    made, kind = fuzz.config("mpsl"), type(join)
    body = registry.encode(join)

    def read(changed):
        return admission.read(fakes.control(fakes.Link("d0"), changed), made, fuzz.network())

    assert read(body)[1] is None
    refused = 0
    for path in lies.leaves(body):
        for value in (0, -1, 2**31 - 1, 2**63 - 1, lies.TINY, 1e308):
            changed, at = copy.deepcopy(body), None
            at = changed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            asked, reason = read(changed)
            assert asked is not None or reason, path
            refused += reason is not None
            if reason is not None:
                assert reason.isprintable() and len(reason) < 2000
    assert refused > 50 or kind is messages.JoinNode


def test_a_join_may_not_ask_for_more_turns_than_a_round_can_have(tmp_path):
    made = support.config(tmp_path, SAMPLES, dtype="float32", method="sl")
    made.pipeline.cut, made.pipeline.micro_batches, made.pipeline.hand_on = 1, 1, "step"
    made = resolve(made)
    join = admission.device_join(made, "d0", fuzz.loader(0), fuzz.network())
    many = dataclasses.replace(join, samples=7 * 10**6, steps=10**6)
    assert admission.why_not_join(join, made, fuzz.network()) is None
    assert "turns in a round of 3 devices" in admission.why_not_join(many, made, fuzz.network())


ANSWERS = [
    (messages.Met(2), messages.Meet(2, (), {}, ())),
    (messages.Compiled(1, None), messages.CompileAhead(1, fuzz.plan("pipar"))),
    (messages.KeptState(1, None), messages.KeepState("ab", 1)),
    (messages.RestoredState(1, None, 0), messages.RestoreState("ab", 1, True)),
    (messages.Evaluated(1, 0.0, 1, {}), messages.Evaluate(1)),
    (messages.Halted(1, 2, 2), messages.Halt(1, ())),
    (messages.Rewound(1, 2), messages.Rewind(1, 2)),
    (messages.Prepared(1.0, 1), messages.Prepare(fuzz.plan("pipar"), (17, 14), (3, 2), "ab")),
    (messages.Calibrated(1.0), messages.Calibrate()),
    (messages.Trained(1), None),
    (messages.Dropped(1), None),
    (messages.Stored(1, 0, 0.0, Memory(0, 0, 0), 0.0, 0, {}), None),
    (messages.Working("timing", 1, 2), None),
    (messages.Pulse(3), None),
    (messages.Progress(1, 0, 0.5, {}, 0), None),
    (messages.NonFinite("loss", 1, 0, 0), None),
]


@pytest.mark.parametrize(("honest", "command"), ANSWERS, ids=lambda one: type(one).__name__)
def test_no_number_of_an_answer_ends_more_than_its_link(honest, command):
    for path, value in lies.all_lies(type(honest)):
        if (lie := lies.told(honest, path, value)) is None:
            continue
        side = fuzz.Coordinator("pipar")
        owed = [reply(type(honest))] if command is None else answers(command)
        for name, said in (("d1", lie), ("d0", honest)):
            if command is not None or type(honest).__name__ in ("Trained", "Dropped", "Stored"):
                side.members.by_name[name].owed.add(owed)
            side.links[name].on_message(fakes.control(side.links[name], registry.encode(said)))
            if name == "d0" and isinstance(honest, messages.Progress | messages.NonFinite):
                break  # they are of device 1
            try:
                while not side.members.links.mail.empty():
                    side.members.poll()
            except PeerError as error:
                assert name == "d1" and str(error).startswith("device 1 "), error
                assert side.links["d1"].ended and not side.links["d0"].ended


def test_every_message_of_a_member_with_a_number_is_lied_about():
    answered = {type(honest) for honest, _ in ANSWERS}
    surveyed = {kind for *_, kinds in SURVEYS.values() for kind in kinds}
    in_rounds = {messages.ClientModel}  # whose numbers are those that were asked for
    joined = {messages.JoinDevice, messages.JoinNode}
    said = answered | surveyed | in_rounds | joined | {messages.LookSeen, Evaluated}
    numbered = {kind for kind in lies.members_kinds() if list(lies.numbers(struct(kind)))}
    assert numbered <= said
