"""Replicas whose steps have one micro-batch write its gradient instead of adding it to zeros."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.training import compile, optimizer
from pipar_jax.training.replica import Replica
from tests.pipar_jax.runtime import support

CLASSES = support.CLASSES


def replicas(model, single):
    params, state = model.init(0)
    made = optimizer.compiled(OptimizerConfig(momentum=0.9), steps=4)
    found = [Replica(stage, params, state, made) for stage in stages.split(model, (1,))]
    for replica in found:
        replica.expect(single=single)
    return found


def train(parts, samples, micro_batches, scale=1.0):
    first, last = parts
    x = jnp.asarray(np.random.default_rng(0).normal(size=(samples, *support.SHAPE)), jnp.float32)
    labels = jnp.arange(samples) % CLASSES
    size = samples // micro_batches
    for step in range(2):
        for start in range(0, samples, size):
            draw = stages.make_draw(samples, step=step, position=start)
            y, residuals = first.forward(x[start : start + size], draw, {})
            _, cotangent = last.loss(y, labels[start : start + size], draw, {})
            first.backward(residuals, cotangent)
        for part in parts:
            part.update(scale)


@pytest.mark.parametrize(("micro_batches", "scale"), [(1, 1.0), (1, 0.5), (2, 1.0)])
def test_weights_are_those_of_an_accumulator(micro_batches, scale):
    """Also where a step has more micro-batches than were expected: nothing is lost."""
    model = support.model(dtype="float32")
    made = []
    for single in (False, True):
        parts = replicas(model, single)
        train(parts, 4, micro_batches, scale)
        made.append([(part.params, part.opt_state) for part in parts])
        assert all((part.accumulated is None) == single for part in parts)
        assert parts[0].nbytes == replicas(model, False)[0].nbytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *made)


def test_a_step_without_a_micro_batch_goes_on_with_a_gradient_of_zero():
    parts = replicas(support.model(dtype="float32"), True)
    before = jax.tree.map(jnp.array, parts[0].params)
    parts[0].update()
    jax.tree.map(np.testing.assert_array_equal, parts[0].params, before)


def test_between_steps_it_may_come_to_expect_the_other_kind():
    parts = replicas(support.model(dtype="float32"), True)
    for part in parts:
        part.expect(single=False)
        assert not part.single
        assert not any(leaf.any() for leaf in jax.tree.leaves(part.accumulated))


@pytest.mark.parametrize("function", [compile.compile_all, compile.run_all])
def test_compiling_leaves_it_as_it_is(function):
    model = support.model(dtype="float32")
    parts = replicas(model, True)
    before = [jax.tree.map(jnp.array, part.params) for part in parts]
    function(model, parts, (2,))
    for part, weights in zip(parts, before, strict=True):
        assert part.accumulated is None
        jax.tree.map(np.testing.assert_array_equal, part.params, weights)
