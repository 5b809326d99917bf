"""The first micro-batch of a replica's step writes its gradient, and the others add theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from pipar_jax.config import OptimizerConfig
from pipar_jax.errors import RunError
from pipar_jax.schedule.keep import Keep
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


@pytest.mark.parametrize("single", [True, False])
def test_a_step_without_a_micro_batch_goes_on_with_a_gradient_of_zero(single):
    """Whatever the step before has left in the accumulator."""
    parts = replicas(support.model(dtype="float32"), single)
    train(parts, 4, 1 if single else 2)
    for part in parts:
        part.opt_state = jax.tree.map(jnp.zeros_like, part.opt_state)  # no momentum
        before = jax.tree.map(jnp.array, part.params)
        part.update()
        jax.tree.map(np.testing.assert_array_equal, part.params, before)


def test_what_is_left_of_a_step_that_is_given_up_does_not_count():
    made = []
    for given_up in (False, True):
        parts = replicas(support.model(dtype="float32"), False)
        if given_up:
            x = jnp.ones((2, *support.SHAPE))
            draw = stages.make_draw(4)
            state = parts[0].state
            _, residuals = parts[0].forward(x, draw, {})
            parts[0].backward(residuals, jnp.ones_like(parts[0].forward(x, draw, {})[0]))
            parts[0].state = state
            parts[0].clear()
        train(parts, 4, 2)
        made.append([(part.params, part.opt_state) for part in parts])
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_between_steps_it_may_come_to_expect_the_other_kind():
    parts = replicas(support.model(dtype="float32"), True)
    for part in parts:
        part.expect(single=False)
        assert not part.single
        assert part.fresh
        assert part.accumulated is not None


@pytest.mark.parametrize("function", [compile.compile_all, compile.run_all])
def test_compiling_leaves_it_as_it_is(function):
    model = support.model(dtype="float32")
    parts = replicas(model, True)
    before = [jax.tree.map(jnp.array, part.params) for part in parts]
    function(model, parts, (2,))
    for part, weights in zip(parts, before, strict=True):
        assert part.accumulated is None
        jax.tree.map(np.testing.assert_array_equal, part.params, weights)


@pytest.mark.parametrize(("keeps", "depth"), [(Keep.STEP, 1), (Keep.STEP | Keep.STEP_BEFORE, 2)])
def test_a_copy_goes_back_as_many_steps_as_it_keeps(keeps, depth):
    """To the bits of the moment, and from there it takes the same steps again."""
    model = support.model(dtype="float32")
    params, state = model.init(0)
    made = optimizer.compiled(OptimizerConfig(momentum=0.9), steps=4)
    replica = Replica(stages.split(model, ())[0], params, state, made, keeps)
    replica.begin_round(5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *support.SHAPE)), jnp.float32)

    def take_step(step):
        replica.loss(x, jnp.arange(4) % CLASSES, stages.make_draw(4, step=step), {})
        replica.update()
        replica.step = step + 1

    def now():
        return jax.tree.map(np.array, (replica.params, replica.state, replica.opt_state))

    moments = {5: now()}
    for step in range(5, 9):
        take_step(step)
        moments[step + 1] = now()
    assert replica.least_step == 9 - depth
    with pytest.raises(RunError, match=f"comes to step 9 cannot go back to step {8 - depth}"):
        replica.rewind(8 - depth)
    replica.rewind(9 - depth)
    jax.tree.map(np.testing.assert_array_equal, now(), moments[9 - depth])
    assert replica.least_step == replica.step == 9 - depth  # what it kept is used up
    for step in range(9 - depth, 9):
        take_step(step)
    jax.tree.map(np.testing.assert_array_equal, now(), moments[9])
    replica.rewind(8)
    jax.tree.map(np.testing.assert_array_equal, now(), moments[8])
