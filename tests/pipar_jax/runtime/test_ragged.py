"""A last mini-batch that is not full needs no compilation of its own, where that is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.runtime.ragged import MicroBatchSizes
from pipar_jax.schedule.host_program import HostProgram
from tests.pipar_jax.runtime import support
from tests.pipar_jax.runtime.test_compiled_once import OF_STAGES

BATCH = 8


def setting(folder, method, samples, micro_batches=2):
    made = support.config(folder, samples, method=method, batch=BATCH, dtype="float32")
    chosen = METHODS[method]
    made.pipeline.cut, made.pipeline.micro_batches = 1, micro_batches if chosen.cuts else 1
    if chosen.uses_nodes:
        made.nodes.count, made.pipeline.cuts = 1, "1,2" if chosen.labels_home else "1"
    return made


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("method", METHODS)
def test_stages_are_compiled_for_full_mini_batches_alone(compiled, method, tmp_path):
    network = stages.build("mlp", input_shape=support.SHAPE, classes=support.CLASSES)
    samples = (13,) if METHODS[method].one_device else (13, 21)  # 5 samples are left on each
    made = setting(tmp_path, method, samples)
    support.trained(made, samples, network)
    plan = plan_for(resolve(made), network.unit_names)
    distinct = {
        plan.units(place, stage, len(network.units))
        for place, device in enumerate(plan.devices)
        for stage in range(device.stages)
    }
    last = len(network.units) - 1
    functions = sum(1 if units[-1] == last else 2 for units in distinct)
    assert len([name for name in compiled if name in OF_STAGES]) == functions


@pytest.mark.sampled(3)
@pytest.mark.parametrize("codec", ["raw", "bfloat16", "int8", "bits:8"])
def test_filled_micro_batches_train_as_those_that_are_not(codec, tmp_path, monkeypatch):
    def run(folder):
        made = setting(tmp_path / folder, "pipar", (13,), micro_batches=3)
        made.pipeline.activation_codec = made.pipeline.cotangent_codec = codec
        return support.trained(made, (13,), support.model(dtype="float32")).params

    filled = run("filled")
    monkeypatch.setattr(MicroBatchSizes, "told", lambda self, replicas: None)
    monkeypatch.setattr(MicroBatchSizes, "of", lambda self, samples: samples)
    assert support.largest_difference(run("apart"), filled) < 1e-6


@pytest.mark.parametrize(
    ("name", "norm", "private", "fills"),
    [
        ("vgg5", "group", False, True),
        ("vgg5", "batch", False, False),  # statistics would see the copies
        ("vgg5", "group", True, False),  # each sample's gradient is clipped
        ("mlp", "group", False, True),
    ],
)
def test_what_would_see_copies_is_compiled_for_the_smaller_sizes(name, norm, private, fills):
    network = stages.build(name, input_shape=(32, 32, 3), classes=10, norm=norm)
    plan = plan_for(resolve(setting("/nowhere", "pipar", (13,))), network.unit_names)
    for host in ("d0", "server"):
        sizes = MicroBatchSizes(
            network, HostProgram(plan, host), (13,), BATCH, exact=not private, known={}
        )
        assert sizes.all == {4, 3, 2}
        assert sizes.computed == ({4} if fills else sizes.all)
        assert [sizes.of(n) for n in (4, 3, 2)] == ([4] * 3 if fills else [4, 3, 2])


class Own(nnx.Module):
    """A network of plain Flax whose samples are apart, or look at their mini-batch."""

    def __init__(self, mixes: bool) -> None:
        rngs = nnx.Rngs(0)
        self.mixes = mixes
        self.first = nnx.Linear(int(np.prod(support.SHAPE)), 6, rngs=rngs)
        self.last = nnx.Linear(6, support.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x.reshape(len(x), -1))
        if self.mixes:
            x = x - 0.01 * x.mean(0)
        return self.last(nnx.relu(x))


def own(mixes: bool) -> stages.Model:
    example = jnp.ones((2, *support.SHAPE), jnp.float32)
    return stages.trace(Own(mixes), example, classes=support.CLASSES)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("method", ["fl", "pipar"])
def test_a_network_of_the_users_own_is_tried(compiled, method, mixes, tmp_path):
    """Samples that are apart are filled up; those that look at others are compiled for."""
    made = setting(tmp_path, method, (13,), micro_batches=1)
    support.trained(made, (13,), own(mixes))
    stages_of_it = [name for name in compiled if name in OF_STAGES]
    functions = {"fl": 1, "pipar": 3}[method]
    # With smaller sizes: a loss that is not told how many count, twice; forward and backward of
    # the device, whose unit mixes, once more.
    more = 2 if mixes else 0
    assert len(stages_of_it) == functions + more


def test_filled_micro_batches_of_an_own_network_train_as_those_that_are_not(tmp_path, monkeypatch):
    def run(folder):
        made = setting(tmp_path / folder, "pipar", (13,), micro_batches=3)
        return support.trained(made, (13,), own(mixes=False)).params

    filled = run("filled")
    monkeypatch.setattr(MicroBatchSizes, "confirm", lambda self, replicas: False)
    monkeypatch.setattr(MicroBatchSizes, "told", lambda self, replicas: None)
    monkeypatch.setattr(MicroBatchSizes, "of", lambda self, samples: samples)
    assert support.largest_difference(run("apart"), filled) < 1e-6


def test_what_is_known_of_a_stage_decides_for_later_plans():
    network = own(mixes=False)
    plan = plan_for(resolve(setting("/nowhere", "fl", (13,))), network.unit_names)
    stage = (network.unit_names[0], network.unit_names[-1])
    for known, fills, settled in (({}, True, False), ({stage: True}, True, True),
                                  ({stage: False}, False, False)):  # fmt: skip
        sizes = MicroBatchSizes(network, HostProgram(plan, "d0"), (13,), BATCH, exact=True,
                                known=known)  # fmt: skip
        assert sizes.fills == fills
        sizes.settle()
        assert sizes.fills == settled
        assert sizes.computed == ({8} if settled else {8, 5})


@pytest.mark.soak
def test_a_size_that_was_not_timed_lasts_in_proportion_to_one_that_was(double, tmp_path):
    """Places of a sampled run are timed for full mini-batches, and a device may have fewer."""
    samples = (16, 5)
    made = setting(tmp_path, "pipar", samples, micro_batches=3)
    made.cohort.size, made.aggregation.every, made.epochs = 1, "epoch", 4
    made.server.slowdown = made.devices.defaults.slowdown = 1.5
    made.model.dtype = "float64"
    support.trained(made, samples, support.chain())
