"""Tensors and commands of what was given up: discarded without blame, or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from comms import Role, Tag
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.course import Course
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, Boundary
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.roles.test_fuzz import BATCH, SAMPLES, STEPS, config, network, plan

SPANS = (Span(0, 0, 2), Span(1, 0, 2))


def tensors(place, attempt, step=0):
    """The labels and the activation of a place's first micro-batch in a step."""
    tag = Tag(
        role=Role.LABEL, device=place, stage=1, step=step, micro_batches=3, samples=3,
        batch_samples=7, attempt=attempt,
    )  # fmt: skip
    link = fakes.Link(f"d{place}")
    shape = network().shapes(3)[plan("pipar").devices[0].cuts[0]]
    activation = dataclasses.replace(tag, role=Role.ACTIVATION)
    return (
        fakes.tensor(link, tag, np.zeros(3, np.int32)),
        fakes.tensor(link, activation, np.zeros(shape.shape, shape.dtype)),
    )


def server():
    made = Acceptance(
        network(), plan("pipar"), COORDINATOR, samples=SAMPLES, batch_size=BATCH,
        lengths=StepLengths(()),
    )  # fmt: skip
    made.open(SPANS, 4, SAMPLES)
    return made


def test_what_a_dropped_place_still_sends_is_of_the_past():
    made = server()
    labels, activation = tensors(1, 4)
    assert made.objection("d1", labels) is None
    made.drop(1)
    assert made.objection("d1", activation) is not None and made.is_past(activation.tag)
    for message in tensors(0, 4):  # the others go on
        assert made.objection("d0", message) is None


def test_a_step_may_be_sent_again_in_another_attempt():
    made = server()
    for message in tensors(0, 4):
        assert made.objection("d0", message) is None
    made.open(SPANS, 5, SAMPLES)
    for message in tensors(0, 4):
        assert made.objection("d0", message) is not None and made.is_past(message.tag)
    for message in tensors(0, 5):
        assert made.objection("d0", message) is None and not made.is_past(message.tag)


def test_what_was_not_asked_for_is_no_past():
    made = server()
    labels, activation = tensors(0, 4)
    assert made.objection("d0", activation) is not None  # before its labels
    assert not made.is_past(activation.tag) and not made.is_ahead(activation.tag)
    (early, _) = tensors(0, 6)
    assert made.objection("d0", early) is not None
    assert made.is_ahead(early.tag) and not made.is_past(early.tag)
    assert not made.is_past(Tag(role=Role.WEIGHT))
    assert made.objection("d0", labels) is None


def commanded(*some):
    """Returns what a device says about the last of some commands, or None."""
    course = Course(hosts_of(config("pipar")), "d0", network().unit_names)
    course.objection(messages.Prepare(plan("pipar"), SAMPLES, STEPS, "ab"))
    course.replied(messages.Prepared(0.0, 0))
    found = None
    for one in some:
        if isinstance(one, messages.Trained | messages.Dropped):
            course.replied(one)
        else:
            found = course.objection(one)
    return found


def release(round_=0, attempt=1, first=0):
    spans = tuple(Span(place, first, 2) for place in range(2))
    return messages.Release(round_, attempt, spans, (0, 1), SAMPLES, None, (1.0, 1.0))


COMMIT = messages.Commit(0, (0, 1))
GOOD = {
    "a round": (release(), messages.Trained(0), COMMIT),
    "without another": (release(), messages.Drop(0, 1, 0), messages.Trained(0), COMMIT),
    "dropped, and the next round": (release(), messages.Drop(0, 0, 0), messages.Dropped(0),
                                    release(1, 2, 1)),
    "the same round again": (release(), messages.Drop(0, 0, 0), messages.Dropped(0), release(0, 2)),
}  # fmt: skip
BAD = {
    "a commit before it has trained": (release(), COMMIT),
    "a commit of another round": (release(), messages.Trained(0), messages.Commit(1, (0, 1))),
    "a place that there is not": (release(), messages.Trained(0), messages.Commit(0, (2,))),
    "a drop of another round": (release(), messages.Drop(1, 1, 0)),
    "a drop of a step beyond": (release(), messages.Drop(0, 1, 3)),
    "a halt where nothing is summed": (release(), messages.Halt(0, (1,))),
    "a rewind without a halt": (release(), messages.Rewind(0, 0)),
    "an old attempt": (release(), messages.Drop(0, 0, 0), messages.Dropped(0), release(1, 1)),
    "a round in the midst of another": (release(), release(1, 2)),
    "a cohort with a device twice": (
        dataclasses.replace(release(), cohort=(0, 0)),
    ),
    "a cohort of strangers": (dataclasses.replace(release(), cohort=(0, 7)),),
    "a meeting anew for a link that it does not name": (
        messages.Meet(1, (), {}, (Boundary("d0", "d1", 0),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_what_may_come_when_a_place_is_lost(case):
    assert commanded(*GOOD[case]) is None


@pytest.mark.parametrize("case", BAD)
def test_what_may_not_come(case):
    assert commanded(*BAD[case]) is not None
