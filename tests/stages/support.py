"""Small networks and batches that several tests of stages share."""

from __future__ import annotations

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import stages
from stages.models.blocks import Options
from stages.models.resnet import ResidualBlock, ResNetHead, Stem
from stages.tasks.task import LOSS


@functools.cache
def small_resnet(dtype=jnp.float32, norm="group") -> stages.Model:
    """A residual network of four units on 8x8x3, small enough for float64; one for all tests."""
    options = Options((8, 8, 3), 5, norm, "cifar", jnp.dtype(dtype))
    units = [
        ("stem", partial(Stem, 3, 8, options)),
        ("block1", partial(ResidualBlock, 8, 8, 1, False, options)),
        ("block2", partial(ResidualBlock, 8, 16, 2, False, options)),
        ("head", partial(ResNetHead, 16, options)),
    ]
    return stages.Model.from_units("small", units, (8, 8, 3), 5)


def batch(model: stages.Model, samples: int, dtype=np.float32, seed: int = 0):
    """Random images and labels."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, *model.input_shape)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(random.integers(0, model.classes, samples), jnp.int32)


def bounds(samples: int, count: int) -> list[tuple[int, int]]:
    """Splits a mini-batch into micro-batches whose sizes differ by at most one."""
    edges = [samples * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def step(model, cuts, params, state, x, y, micro_batches=1, rematerialise=False, **draw):
    """Runs one mini-batch through the stages of a cut: metrics, gradients, state."""
    parts = stages.split(model, cuts, rematerialise=rematerialise)
    held = [stages.select(part, params) for part in parts]
    states = [stages.select(part, state) for part in parts]
    sums = [part.zeros(own) for part, own in zip(parts, held, strict=True)]
    totals = dict.fromkeys((LOSS, *model.task.streamed), 0.0)
    dtype = x.dtype.type if jnp.issubdtype(x.dtype, jnp.floating) else np.float32
    for start, stop in bounds(len(x), micro_batches):
        scalars = stages.make_draw(len(x), position=start, dtype=dtype, **draw)
        h, kept = x[start:stop], []
        for i, part in enumerate(parts[:-1]):
            h, residuals, states[i] = part.forward(held[i], states[i], h, scalars)
            kept.append(residuals)
        metrics, cotangent, sums[-1], states[-1] = parts[-1].loss(
            held[-1], states[-1], h, y[start:stop], scalars, sums[-1]
        )
        for i in reversed(range(len(parts) - 1)):
            cotangent, sums[i] = parts[i].backward(held[i], kept[i], cotangent, sums[i])
        assert cotangent is None or cotangent.shape == ()  # nobody needs the samples' cotangent
        totals = {name: totals[name] + metrics[name] for name in totals}
    return totals, stages.join(sums), stages.join(states)


def pulled(function, cotangent, *inputs):
    """Value and gradients of a function, compiled as one program: op by op takes far longer."""

    def both(cotangent, *inputs):
        value, pull = jax.vjp(function, *inputs)
        return value, pull(cotangent)

    return jax.jit(both)(cotangent, *inputs)


def assert_close(actual, expected, rtol: float, atol: float = 0.0) -> None:
    """Compares two pytrees; the tolerance is relative to each array's largest element."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        # In numpy: jax would compile something for every shape there is.
        a, b = np.asarray(a), np.asarray(b)
        largest = float(np.abs(b).max()) if b.size else 0.0
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * largest + atol, err_msg=jax.tree_util.keystr(path)
        )
