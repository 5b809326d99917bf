"""Side inputs on a link: each in its turn, with its shape and type, or it is an error."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import stages
from comms import Role, Tag
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR
from stages.lengths import padded_to
from stages.signature import ArrayType
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support

SAMPLES, BATCH, ATTEMPT = (6,), 3, 1
SHAPE = (3, 4)


@pytest.fixture(scope="module")
def model():
    """A network whose second unit takes a mask and a weight, with two targets."""

    def run(params, x, mask, weight):
        y = jnp.tanh(x @ params["a"]["kernel"])
        return (y @ params["b"]["kernel"]) * mask * weight[:, None]

    example = {"": np.ones((1, 4), np.float32), "mask": np.ones((1, 4), bool),
               "weight": np.ones(1, np.float32)}  # fmt: skip
    params = {name: {"kernel": jnp.ones((4, 4))} for name in "ab"}
    targets = {"y": ArrayType((), "int32"), "value": ArrayType((2,), "float32")}
    task = stages.Task("both", lambda outputs, targets: jnp.mean(outputs**2, axis=1))
    return stages.trace(run, example, params=params).for_task(task).receiving(targets)


@pytest.fixture
def accepted(model):
    config = support.config("/nowhere", SAMPLES, dtype="float32", batch=BATCH)
    config.pipeline.cut = config.pipeline.micro_batches = 1
    made = Acceptance(
        model, plan_for(resolve(config), model.unit_names), COORDINATOR, samples=SAMPLES,
        batch_size=BATCH, lengths=StepLengths(model.lengths),
    )  # fmt: skip
    made.open([Span(0, 0, 2)], ATTEMPT, SAMPLES)
    return made


def tensors(step=0):
    """What a device sends of a micro-batch, in its order."""
    tag = Tag(
        role=Role.ACTIVATION, device=0, stage=1, step=step, micro_batches=1, samples=3,
        batch_samples=3, attempt=ATTEMPT,
    )  # fmt: skip
    return [
        (dataclasses.replace(tag, role=role, entry=entry), array)
        for role, entry, array in (
            (Role.LABEL, 0, np.zeros((3, 2), np.float32)),
            (Role.LABEL, 1, np.zeros(3, np.int32)),
            (Role.SIDE, 0, np.ones(SHAPE, bool)),
            (Role.SIDE, 1, np.ones(3, np.float32)),
            (Role.ACTIVATION, 0, np.ones(SHAPE, np.float32)),
        )
    ]


def objection(accepted, tag, array, codec="raw"):
    return accepted.objection("d0", fakes.tensor(fakes.Link("d0"), tag, array, codec))


def test_all_of_them_are_taken_in_their_order(accepted):
    for step in (0, 1):
        for tag, array in tensors(step):
            assert objection(accepted, tag, array) is None


@pytest.mark.parametrize("missing", range(4))
def test_none_may_be_missing_twice_or_out_of_turn(accepted, missing):
    whole = tensors()
    for tag, array in whole[:missing]:
        assert objection(accepted, tag, array) is None
    for place, (tag, array) in enumerate(whole):
        if place != missing:
            assert "expected the" in objection(accepted, tag, array)
    for tag, array in whole[missing:]:
        assert objection(accepted, tag, array) is None


@pytest.mark.parametrize(
    ("place", "array", "says"),
    [
        (2, np.ones((3, 5), bool), r"expected bool\[3, 4\] in raw"),
        (2, np.ones((2, 4), bool), r"expected bool\[3, 4\] in raw"),
        (2, np.ones(SHAPE, np.uint8), r"expected bool\[3, 4\] in raw"),
        (2, np.full(SHAPE, 7, np.uint8).view(bool), "a bool of value 7, expected 0 or 1"),
        (3, np.ones(3, np.float64), r"expected float32\[3\] in raw"),
        (3, np.full(3, np.nan, np.float32), "not finite"),
        (0, np.full((3, 2), np.inf, np.float32), "not finite"),
    ],
)
def test_another_shape_type_or_value_is_refused(accepted, place, array, says):
    whole = tensors()
    for tag, one in whole[:place]:
        assert objection(accepted, tag, one) is None
    found = objection(accepted, whole[place][0], array)
    assert found is not None
    assert re.search(says, found), found


def test_a_codec_or_an_entry_that_does_not_exist_is_refused(accepted):
    whole = tensors()
    for tag, array in whole[:3]:
        assert objection(accepted, tag, array) is None
    tag, array = whole[3]
    assert "expected the side input weight" in objection(
        accepted, dataclasses.replace(tag, entry=2), array
    )
    assert "in raw" in objection(accepted, tag, array, "bfloat16")
    # The largest of them bounds what a link takes at a time.
    assert accepted.tensor_bytes("d0") >= 3 * 4 * 4


LENGTHS = (2, 4)


@pytest.fixture
def varied(model):
    """What a node takes in the middle of a chain, of samples that are padded to two lengths."""

    def run(params, x, mask):
        y = jnp.tanh(x * params["a"]["scale"])
        z = jnp.tanh(y * params["b"]["scale"])
        return (z * mask * params["c"]["scale"])[..., None]

    example = {"": np.ones((1, 4), np.float32), "mask": np.ones((1, 4), bool)}
    params = {name: {"scale": jnp.ones(())} for name in "abc"}
    task = stages.make_task("language")
    tokens = {"y": ArrayType((4,), "int32")}
    made = stages.trace(run, example, params=params).for_task(task).receiving(tokens)
    network = padded_to(made, LENGTHS)
    config = support.config("/nowhere", SAMPLES, dtype="float32", batch=BATCH, method="mpsl")
    config.nodes.count, config.pipeline.cuts, config.pipeline.micro_batches = 1, "1,2", 1
    plan = plan_for(resolve(config), network.unit_names)
    acceptance = Acceptance(
        network, plan, "n1", samples=SAMPLES, batch_size=BATCH, lengths=StepLengths(LENGTHS)
    )
    acceptance.open([Span(0, 0, 2)], ATTEMPT, SAMPLES)
    return acceptance


def made_of(role, length, step=0):
    """A tensor of a sample's length: a mask, what it lets through, or the cotangent of that."""
    tag = dataclasses.replace(tensors(step)[-1][0], role=role)
    return tag, np.ones((3, length), bool if role == Role.SIDE else np.float32)


MASK, UP, DOWN = Role.SIDE, Role.ACTIVATION, Role.COTANGENT


def test_each_step_may_have_another_length(varied):
    for step, length in enumerate((4, 2)):
        for role in (MASK, UP, DOWN):
            assert objection(varied, *made_of(role, length, step)) is None


@pytest.mark.parametrize(
    ("before", "lie", "says"),
    [
        ([], (MASK, 3), r"expected bool\[3, 2\] or \[3, 4\] in raw"),
        ([], (DOWN, 4), r"expected float32"),  # before what it is the cotangent of
        ([(MASK, 2)], (UP, 4), r"expected float32\[3, 2\]$"),
        ([(MASK, 2), (UP, 2)], (DOWN, 4), r"expected float32\[3, 2\]$"),
        ([(MASK, 4), (UP, 4), (DOWN, 4)], (MASK, 3, 1), r"expected bool\[3, 2\] or \[3, 4\]"),
    ],
)
def test_a_tensor_of_another_length_than_its_step_is_refused(varied, before, lie, says):
    for one in before:
        assert objection(varied, *made_of(*one)) is None
    found = objection(varied, *made_of(*lie))
    assert found is not None
    assert re.search(says, found), found
