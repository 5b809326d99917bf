"""Who may say what of its steps: each host of what it has, in the round that is under way.

With ``run.nonfinite=drop`` what is not finite and no single device's ends the run, so that nobody
else may say so: over all methods, hosts, kinds and numbers.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.mail import Member
from pipar_jax.roles.replies import reply
from pipar_jax.roles.step_reports import StepReports
from pipar_jax.runtime import moves
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import ALL, Span
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.runtime import support

ROUND, FIRST, STOP = 3, 6, 8
SAMPLES, BATCH = (14, 14), 7
#: Methods with their policies for weights.
WAYS = [
    (method, way)
    for method, known in METHODS.items()
    for way in ("copy", "shared")
    if way == "copy" or (method in ("pipar", "mpsl") and not known.one_device)
]
NUMBERS = (0, 1, FIRST - 1, FIRST, STOP - 1, STOP, 2**31 - 1)


class Side:
    """The members of a run in the midst of a round, and what was made of their reports."""

    def __init__(self, method, way, nonfinite="drop"):
        self.network = support.model("mlp", "float32")
        samples = SAMPLES[:1] if METHODS[method].one_device else SAMPLES
        made = support.config("/nowhere", samples, dtype="float32", batch=BATCH, method=method)
        made.aggregation.every, made.cohort.below = "epoch", "repeat"
        made.run.nonfinite = nonfinite
        made.pipeline.cut, made.pipeline.micro_batches = 1, 1 if method == "sl" else 2
        if METHODS[method].uses_nodes:
            made.nodes.count, made.pipeline.cuts = 1, "1,2"
            if not METHODS[method].labels_home:
                made.nodes.count = 2
        if way == "shared":
            made.pipeline.weights = way
        self.plan = plan_for(resolve(made), self.network.unit_names)
        rights = Acceptance(self.network, self.plan, COORDINATOR, samples=samples,
                            batch_size=BATCH, lengths=StepLengths(()))  # fmt: skip
        spans = [Span(place, FIRST, STOP) for place in range(len(samples))]
        rights.open(spans, 1, samples)
        self.links = SimpleNamespace(acceptance=rights, seats={})
        hosts = [name for name in self.plan.hosts() if name != COORDINATOR]
        self.members = {name: Member(None, None) for name in hosts}
        self.blamed, self.broken, self.told = [], [], []
        self.reports = StepReports(
            self.network, nonfinite, self.members, self.links,
            tell=self.told.append, blame=lambda name, reason: self.blamed.append(name),
        )  # fmt: skip
        self.reports.broken = self.broken.append
        self.reports.open(self.plan, ROUND, spans)

    def holders(self):
        """The host of each copy of each unit by the unit's name."""
        names = self.network.unit_names
        found = moves.holders(self.plan, len(names))
        return {(copy, names[unit]): host for (copy, unit), host in found.items()}

    def is_taken(self, host, said):
        """Whether a report is believed, and then only that; else its sender alone is blamed."""
        for one in (
            self.blamed,
            self.broken,
            self.told,
            *(m.broken for m in self.members.values()),
        ):
            one.clear()
        self.reports.note_broken(host, said)
        assert self.blamed == ([] if self.broken else [host])
        assert self.broken in ([], [said])
        return bool(self.broken)


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_weights_are_told_by_who_has_them(method, way):
    side = Side(method, way)
    holders, places = side.holders(), range(len(side.plan.devices))
    for host, unit, place in itertools.product(
        side.members, side.network.unit_names, (None, *places, 7)
    ):
        own = holders.get((ALL if place is None else place, unit)) == host
        said = messages.NonFinite("weights", place, ROUND, STOP - 1, (unit,))
        assert side.is_taken(host, said) == own, (host, unit, place)
        assert not side.is_taken(host, messages.NonFinite("weights", place, ROUND, STOP - 1))
        unknown = messages.NonFinite("weights", place, ROUND, STOP - 1, (unit, "another"))
        assert not side.is_taken(host, unknown)


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_an_average_is_told_by_the_nodes_that_make_it(method, way):
    side = Side(method, way)
    count = len(side.network.unit_names)
    for host, (index, unit) in itertools.product(side.members, enumerate(side.network.unit_names)):
        said = messages.NonFinite("average", None, ROUND, STOP - 1, (unit,))
        assert side.is_taken(host, said) == (index in side.plan.local_units(host, count))
        assert not side.is_taken(host, messages.NonFinite("average", 0, ROUND, STOP - 1, (unit,)))


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_a_loss_is_told_where_the_last_stage_is(method, way):
    side = Side(method, way)
    for host, place in itertools.product(side.members, range(len(side.plan.devices))):
        said = messages.NonFinite("loss", place, ROUND, FIRST)
        assert side.is_taken(host, said) == (side.plan.chains[place][-1] == host)
        assert not side.is_taken(host, messages.NonFinite("loss", None, ROUND, FIRST))
        unit = side.network.unit_names[-1]
        assert not side.is_taken(host, messages.NonFinite("loss", place, ROUND, FIRST, (unit,)))


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_no_report_is_of_a_step_or_a_round_that_is_not_under_way(method, way):
    side = Side(method, way)
    holders = side.holders()
    for what, step, round_ in itertools.product(
        ("loss", "weights"), NUMBERS, (ROUND, ROUND + 1, 2**31 - 1)
    ):
        for (copy, unit), host in holders.items():
            if host == COORDINATOR or (what == "loss" and copy == ALL):
                continue
            place = None if copy == ALL else copy
            if what == "loss" and side.plan.chains[place][-1] != host:
                continue
            # Weights of a round without a step are told with the last one before it.
            steps = range(FIRST - (what == "weights"), STOP)
            said = messages.NonFinite(what, place, round_, step, (unit,) * (what == "weights"))
            assert side.is_taken(host, said) == (round_ == ROUND and step in steps), said


def test_progress_is_of_the_round_that_is_under_way():
    side = Side("fl", "copy")
    metrics = dict.fromkeys(side.network.task.streamed, 0.5)
    for step, round_ in itertools.product(NUMBERS, (ROUND, ROUND + 1, 2**31 - 1)):
        side.blamed.clear()
        side.members["d0"].steps.clear()
        side.reports.note_progress("d0", messages.Progress(0, step, 0.5, metrics, round_))
        assert (not side.blamed) == (round_ == ROUND and FIRST <= step < STOP)


def test_what_a_device_says_of_a_round_that_it_was_dropped_from_is_passed_over():
    """Also where the round has begun anew without it, before it has heard of that."""
    side = Side("fl", "copy")
    side.members["d0"].owed.add([reply(messages.Dropped, round=ROUND)])
    side.reports.open(side.plan, ROUND, [Span(1, FIRST, STOP)])
    metrics = dict.fromkeys(side.network.task.streamed, 0.5)
    side.reports.note_progress("d0", messages.Progress(0, FIRST, 0.5, metrics, ROUND))
    side.reports.note_broken("d0", messages.NonFinite("loss", 0, ROUND, FIRST))
    assert not (side.blamed or side.broken or side.told)


@pytest.mark.parametrize("nonfinite", ["drop", "ignore"])
def test_where_gradients_are_summed_a_step_is_taken_back_whoever_was_dropped_first(nonfinite):
    side = Side("mpsl", "shared", nonfinite)
    side.links.acceptance.drop(0)
    (host,) = {chain[-1] for chain in side.plan.chains[:1]}
    side.reports.note_broken(host, messages.NonFinite("loss", 0, ROUND, FIRST))
    assert not side.blamed and len(side.told) == 1
    assert len(side.broken) == (nonfinite == "drop")
