"""What ARCHITECTURE says equals what: every method, every cut, every number of micro-batches."""

from __future__ import annotations

import numpy as np
import optax
import pytest

import stages
from tests.pipar_jax.runtime import support

RTOL = 1e-9
STEPS = 5
#: Full mini-batches of 7, which neither 3 nor 4 micro-batches divide.
EVEN = (35, 35)
#: Ragged mini-batches and an exhausted shard: the shares of the devices change from step to step.
#: The last mini-batches are of six, so that there are no more sizes of micro-batches to compile.
RAGGED = (13, 34)
CUTS = tuple(range(1, len(support.model("mlp", "float32").units)))


def setting(method: str, cut: int, micro_batches: int, tmp_path, samples, **values):
    made = support.config(tmp_path, samples, method=method, **values)
    made.pipeline.cut, made.pipeline.micro_batches = cut, micro_batches
    return made


def union(made, samples):
    loaders = support.batches(made, samples)
    return [[loader.batch(step) for loader in loaders] for step in range(STEPS)]


PARALLEL = [("fl", 1, 1)] + [("sfl", cut, 1) for cut in CUTS]
PARALLEL += [("pipar", cut, n) for cut in CUTS for n in (1, 3, 4)]
#: Every method, every cut, every number of micro-batches; not each with each.
SOME = {("fl", 1, 1), ("sfl", CUTS[-1], 1), ("pipar", 1, 4), *(("pipar", cut, 3) for cut in CUTS)}
FEW = {("fl", 1, 1), ("sfl", 1, 1), ("pipar", CUTS[1], 4)}


def chosen(some):
    """The whole product, of which `make test` runs some."""
    return [pytest.param(*one, marks=[pytest.mark.soak] * (one not in some)) for one in PARALLEL]


@pytest.fixture(scope="module")
def network():
    import jax

    jax.config.update("jax_enable_x64", True)
    yield support.model()
    jax.config.update("jax_enable_x64", False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "cut", "micro_batches"), chosen(SOME))
def test_averaged_each_step_equals_sgd_on_the_union(
    double, network, method, cut, micro_batches, tmp_path
):
    made = setting(method, cut, micro_batches, tmp_path, RAGGED)
    run = support.trained(made, RAGGED, network)
    expected = support.centralised(made, network, union(made, RAGGED))
    assert support.largest_difference(run.params, expected) < RTOL


@pytest.mark.parametrize(("method", "cut", "micro_batches"), chosen(FEW))
def test_so_it_does_with_momentum_and_decay_at_constant_shares(
    double, network, method, cut, micro_batches, tmp_path
):
    made = setting(method, cut, micro_batches, tmp_path, EVEN)
    made.optimizer.momentum, made.optimizer.weight_decay = 0.9, 0.01
    run = support.trained(made, EVEN, network)
    expected = support.centralised(made, network, union(made, EVEN), weight_decay=0.01)
    assert support.largest_difference(run.params, expected) < RTOL


IN_TURN = [
    pytest.param(cut, "constant", samples, hand_on, marks=[pytest.mark.soak] * (cut in CUTS[1:-1]))
    for cut in CUTS
    for samples, hand_on in (((14, 14), "epoch"), ((13, 20), "step"))
]
IN_TURN += [(1, "constant", (14, 14), "step"), (1, "cosine", (13, 20), "epoch")]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("cut", "schedule", "samples", "hand_on"), IN_TURN)
def test_split_learning_equals_sgd_on_the_devices_in_turn(
    double, network, cut, schedule, samples, hand_on, tmp_path
):
    """Over three rounds: momentum, and the step size's course, go with the part."""
    made = setting("sl", cut, 1, tmp_path, samples)
    made.optimizer.momentum, made.pipeline.hand_on = 0.9, hand_on
    made.optimizer.schedule, made.epochs = schedule, 3
    run = support.trained(made, samples, network)
    loaders = support.batches(made, samples)
    groups: list = []
    for epoch in range(made.epochs):
        turns = [(d, s) for d in range(2) for s in range(loaders[d].steps_per_epoch)]
        if hand_on == "step":
            turns.sort(key=lambda turn: (turn[1], turn[0]))
        groups += [[loaders[d].batch(s + epoch * loaders[d].steps_per_epoch)] for d, s in turns]
    rate = made.optimizer.learning_rate
    course = optax.cosine_decay_schedule(rate, len(groups)) if schedule == "cosine" else rate
    expected = support.centralised(made, network, groups, optax.sgd(course, 0.9))
    assert support.largest_difference(run.params, expected) < RTOL


def test_float32_stays_within_its_precision(tmp_path):
    network = support.model("cnn", "float32")
    made = setting("pipar", 2, 3, tmp_path, EVEN, name="cnn", dtype="float32")
    made.optimizer.momentum = 0.9
    run = support.trained(made, EVEN, network)
    expected = support.centralised(made, network, union(made, EVEN))
    assert support.largest_difference(run.params, expected) < 1e-5


def test_devices_with_cuts_of_their_own_aggregate(double, network, tmp_path):
    made = setting("pipar", 1, 3, tmp_path, RAGGED)
    made.devices.overrides = {1: {"cut": CUTS[-1], "micro_batches": 4}}
    run = support.trained(made, RAGGED, network)
    expected = support.centralised(made, network, union(made, RAGGED))
    assert support.largest_difference(run.params, expected) < RTOL


def test_methods_agree_when_devices_take_different_numbers_of_steps(double, network, tmp_path):
    """Averaged once per epoch, only the way to the gradient differs between the methods."""
    found = []
    for method in ("fl", "sfl", "pipar"):
        made = setting(method, 1, 3, tmp_path / method, RAGGED)
        made.aggregation.every, made.epochs = "epoch", 2
        made.optimizer.momentum = 0.9
        found.append(support.trained(made, RAGGED, network).params)
    assert support.largest_difference(found[1], found[0]) < RTOL
    assert support.largest_difference(found[2], found[0]) < RTOL


@pytest.mark.parametrize("method", ["sl", "pipar"])
def test_a_stage_may_have_nothing_to_learn(double, method, tmp_path):
    from flax import nnx

    units = [
        ("flatten", lambda rngs: nnx.Sequential(lambda x: x.reshape(x.shape[0], -1) * 2.0)),
        (
            "dense",
            lambda rngs: nnx.Linear(
                int(np.prod(support.SHAPE)), support.CLASSES, param_dtype=np.float64, rngs=rngs
            ),
        ),
    ]
    network = stages.Model.from_units("own", units, support.SHAPE, support.CLASSES,
                                      input_dtype=np.float64)  # fmt: skip
    samples = RAGGED if method == "pipar" else EVEN[:1]
    made = setting(method, 1, 3, tmp_path, samples)
    run = support.trained(made, samples, network)
    expected = support.centralised(made, network, union(made, samples))
    assert support.largest_difference(run.params, expected) < RTOL


@pytest.mark.parametrize(("method", "parts"), [("fl", (0, 9)), ("pipar", (0, 1, 9))])
def test_clipping_looks_at_all_units_that_a_host_updates_at_once(
    double, network, method, parts, tmp_path
):
    """At the whole model where nothing is cut, at each part by itself under a cut."""
    made = setting(method, 1, 3, tmp_path, EVEN[:1])
    made.optimizer.clip_norm, made.optimizer.momentum = 0.1, 0.9
    run = support.trained(made, EVEN[:1], network)
    tx = optax.chain(support.clip(0.1, parts), optax.sgd(made.optimizer.learning_rate, 0.9))
    expected = support.centralised(made, network, union(made, EVEN[:1]), tx)
    assert support.largest_difference(run.params, expected) < RTOL
    unclipped = support.centralised(made, network, union(made, EVEN[:1]))
    assert support.largest_difference(run.params, unclipped) > 1e-3
