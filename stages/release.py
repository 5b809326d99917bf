"""Releases of a private stage: what leaves it is clipped sample by sample, and noise is added.

Everything here is traced into the compiled functions of a stage, so that nothing leaves them as it
was. The bits of the noise are arguments: where they come from decides whether a release is private
(``pipar_jax.privacy.noise``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stages.accumulation import Fresh, add
from stages.micro_batch_context import MicroBatchContext
from stages.residuals import KeptInputs, Residuals
from stages.trees import PyTree, Variables

#: Among the metrics of a private last stage: how many of a micro-batch's activations, gradients and
#: cotangents were above their clips, int32 [3]. It is for the device alone.
CLIPPED = "clipped"
#: Bytes of per-example gradients that exist at a time, and how many examples these are at most.
PIECE_BYTES, MOST_EXAMPLES = 128 << 20, 64


@dataclasses.dataclass(frozen=True)
class PrivateRelease:
    """What of a stage is released, and how: static, part of a compiled function.

    A clip of 0 means that this is not released.

    Attributes:
      noise: Standard deviation of the noise, divided by the clip.
      activation_clip: Norm to which each sample's whole activation is clipped.
      cotangent_clip: Norm to which each sample's cotangent is clipped, of the sample's loss.
      gradient_clip: Norm to which each example's gradient is clipped, over the stage's weights.
      shape: Shape of a sample of what is sent, an activation or a cotangent.
    """

    noise: float
    activation_clip: float = 0.0
    cotangent_clip: float = 0.0
    gradient_clip: float = 0.0
    shape: tuple[int, ...] = ()

    @property
    def sends(self) -> bool:
        """Whether noise is added to what is sent."""
        return bool(self.activation_clip or self.cotangent_clip)

    def bits_shape(self, samples: int) -> tuple[int, ...]:
        """Returns the shape of the bits, uint32, for what a micro-batch sends."""
        return bits_shape(samples * math.prod(self.shape))

    def release_activation(self, y: jax.Array, draw: MicroBatchContext) -> jax.Array:
        """Returns an activation [micro-batch, …] as it may be sent."""
        if not self.activation_clip:
            return y
        return _noised(y, draw, self.activation_clip, self)

    def release_cotangent(self, cotangent: jax.Array, draw: MicroBatchContext) -> jax.Array:
        """Returns a cotangent [micro-batch, …] of the mini-batch's mean loss as it may be sent."""
        if not self.cotangent_clip:
            return cotangent
        clip = self.cotangent_clip * draw.inverse_batch
        return _noised(cotangent, draw, clip, self)


def bits_shape(numbers: int) -> tuple[int, int]:
    """Returns the shape of the bits that so many normal numbers are made of."""
    return 3, -(-numbers // 2)


def normal(bits: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns standard normal numbers from random bits, by Box and Muller.

    A pair of numbers is made of a radius with 64 bits and an angle with 32. With 32 bits a radius
    would end at 6.8, beyond which one of 10**11 numbers is: runs release more of them than that.

    Args:
      bits: [3, pairs] uint32, as many as ``bits_shape`` says.
      shape: Shape of the result.
      dtype: The result's dtype; at least float32 is computed with.

    Returns:
      [*shape]; their absolute values stay below 9.5, beyond which one of 10**20 pairs is.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    high, low, angle = (word.astype(wide) for word in bits)
    unit = jnp.asarray(2.0**-32, wide)
    # Above 0; numbers next to 0, which make the tail, have all their digits.
    uniform = (high + (low + jnp.asarray(0.5, wide)) * unit) * unit
    length = jnp.sqrt(jnp.maximum(-2.0 * jnp.log(uniform), 0.0))
    angle = angle * jnp.asarray(2.0 * math.pi * 2.0**-32, wide)
    pairs = jnp.concatenate([length * jnp.cos(angle), length * jnp.sin(angle)])
    return pairs[: math.prod(shape)].reshape(shape).astype(dtype)


def clip_samples(x: jax.Array, clip: Any) -> jax.Array:
    """Scales each sample whose norm exceeds a bound down to it.

    Args:
      x: [samples, …].
      clip: The bound.

    Returns:
      Same shape and dtype. A sample that is not finite becomes zero: otherwise it could be told
      from all others, whatever the noise.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1)
    bound = jnp.asarray(clip, wide.dtype) * _margin(x.dtype)
    finite = jnp.isfinite(jnp.sum(jnp.square(jax.lax.stop_gradient(wide)), axis=1, keepdims=True))
    wide = jnp.where(finite, wide, 0.0)
    squared = jnp.sum(jnp.square(wide), axis=1, keepdims=True)
    # Where the norm is at most the bound, the root of the bound: it has a finite derivative.
    scale = bound * jax.lax.rsqrt(jnp.maximum(squared, jnp.square(bound)))
    return (
        (wide * jnp.where(squared > jnp.square(bound), scale, 1.0)).astype(x.dtype).reshape(x.shape)
    )


def samples_within(x: jax.Array, clip: Any) -> jax.Array:
    """Returns which samples of [samples, …] ``clip_samples`` leaves as they are, bool [samples]."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1)
    bound = jnp.asarray(clip, wide.dtype) * _margin(x.dtype)
    return jnp.sum(jnp.square(wide), axis=1) <= jnp.square(bound)


def _margin(dtype: Any) -> float:
    """Returns to which share of a bound is clipped, so that rounding does not exceed it."""
    return 1.0 - 1e-5 - float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _noised(x: jax.Array, draw: MicroBatchContext, clip: Any, release: PrivateRelease) -> jax.Array:
    """Returns samples clipped and with noise, rounded to their dtype only in the end."""
    assert draw.noise is not None, "a private stage was called without bits for its noise"
    wide = jnp.promote_types(x.dtype, jnp.float32)
    clipped = clip_samples(x.astype(wide), clip)
    deviation = jnp.asarray(release.noise * clip, wide)
    return (clipped + deviation * normal(jnp.asarray(draw.noise), x.shape, wide)).astype(x.dtype)


@jax.jit
def add_noise(total: Variables, bits: jax.Array, deviation: PyTree) -> Variables:
    """Adds noise to a sum of clipped gradients or updates.

    Args:
      total: The sum by unit and path.
      bits: [3, pairs of numbers in the sum] uint32; see ``bits_shape``.
      deviation: Standard deviation of the noise.
    """
    leaves, structure = jax.tree.flatten(total)
    widest = jnp.result_type(jnp.float32, *leaves)
    noise = jnp.asarray(deviation, widest) * normal(
        bits, (sum(leaf.size for leaf in leaves),), widest
    )
    made, first = [], 0
    for leaf in leaves:
        own = noise[first : first + leaf.size].reshape(leaf.shape)
        made.append((leaf.astype(widest) + own).astype(leaf.dtype))
        first += leaf.size
    noised: Variables = jax.tree.unflatten(structure, made)
    return noised


#: (params, fixed, state, x, draw, side) -> (output, new statistics), as a stage's units are run.
Train = Callable[..., tuple[jax.Array, Variables]]


def forward(
    train: Train,
    release: PrivateRelease,
    alone: bool,
    params: Variables,
    state: Variables,
    x: PyTree,
    draw: MicroBatchContext,
    side: PyTree,
    fixed: Variables,
) -> tuple[jax.Array, Variables, None]:
    """Traced body of the forward pass of a stage that releases activations and weights.

    With ``alone`` samples are called one by one: together they would draw other dropout masks than
    in ``backward``, whose gradients would then be those of no loss.
    """
    if alone:
        y, after = _one_by_one(train, params, state, x, draw, side, fixed), state
    else:
        y, after = train(params, fixed, state, x, draw, side)
    return release.release_activation(y, draw), after, None


def _one_by_one(
    train: Train,
    params: Variables,
    state: Variables,
    x: PyTree,
    draw: MicroBatchContext,
    side: PyTree,
    fixed: Variables,
) -> jax.Array:
    """Returns the activations [micro-batch, …] of samples that are each a batch of its own."""

    def one(example: PyTree) -> jax.Array:
        (x, side), position = example
        x, side = jax.tree.map(lambda array: array[None], (x, side))
        return train(params, fixed, state, x, _at(draw, position), side)[0][0]

    count = jax.tree.leaves(x)[0].shape[0]
    examples = (x, dict(side)), jnp.arange(count, dtype=jnp.uint32)
    together = examples_at_a_time(params, count)
    y: jax.Array = jax.lax.map(one, examples, batch_size=None if together == 1 else together)
    return y


def backward(
    train: Train,
    release: PrivateRelease,
    params: Variables,
    residuals: Residuals,
    cotangent: jax.Array,
    accumulated: Variables | None,
    fresh: Fresh,
    fixed: Variables,
) -> tuple[jax.Array, Variables]:
    """Traced body of the backward pass of a first stage: DP-SGD on its weights.

    The cotangents are functions of released activations, so given these an example's gradient is
    a function of that example alone.

    Returns:
      How many were above their clips, see ``CLIPPED``; and the accumulated gradients.
    """
    recipe = residuals.recipe
    assert isinstance(recipe, KeptInputs)
    state, x, draw, side = jax.tree.unflatten(recipe.tree, residuals.borrowed)

    def gradient(own: PyTree, position: jax.Array) -> tuple[Variables, jax.Array]:
        x, side, cotangent = own
        at = _at(draw, position)

        def run(params: Variables) -> tuple[jax.Array, jax.Array]:
            y, _ = train(params, fixed, state, x, at, side)
            if not release.activation_clip:
                return y, jnp.asarray(True)
            within = samples_within(y, release.activation_clip)[0]
            return clip_samples(y, release.activation_clip), within

        _, pull, within = jax.vjp(run, params, has_aux=True)
        return pull(cotangent)[0], within

    clip = release.gradient_clip * draw.inverse_batch
    total, within, sent = _sum_of_clipped(gradient, (x, side, cotangent), clip, params)
    above = _above(sent, within, jnp.asarray(True))
    return above, add(accumulated, total, fresh)


def loss(
    train: Train,
    total_loss: Callable[..., tuple[jax.Array, PyTree]],
    release: PrivateRelease,
    is_first: bool,
    params: Variables,
    state: Variables,
    x: PyTree,
    labels: PyTree,
    draw: MicroBatchContext,
    accumulated: Variables | None,
    fresh: Fresh,
    side: PyTree,
    fixed: Variables,
) -> tuple[PyTree, jax.Array | None, Variables, Variables]:
    """Traced body of a last stage on a device: DP-SGD on its weights, and a released cotangent."""

    def gradient(own: PyTree, position: jax.Array) -> tuple[Variables, PyTree]:
        x, side, labels = own
        at = _at(draw, position)

        def run(params: Variables, x: PyTree) -> tuple[jax.Array, tuple[PyTree, Variables]]:
            outputs, after = train(params, fixed, state, x, at, side)
            total, metrics = total_loss(outputs, labels)
            return total * draw.inverse_batch, (metrics, after)

        argnums = (0,) if is_first else (0, 1)
        gradients, (metrics, _) = jax.grad(run, argnums, has_aux=True)(params, x)
        return gradients[0], (metrics, None if is_first else gradients[1][0])

    clip = release.gradient_clip * draw.inverse_batch
    total, within, (metrics, cotangent) = _sum_of_clipped(gradient, (x, side, labels), clip, params)
    metrics = jax.tree.map(lambda one: jnp.sum(one, axis=0), metrics)
    sent = jnp.asarray(True)
    if cotangent is not None and release.cotangent_clip:
        sent = samples_within(cotangent, release.cotangent_clip * draw.inverse_batch)
    if cotangent is not None:
        cotangent = release.release_cotangent(cotangent, draw)
    metrics = {**metrics, CLIPPED: _above(jnp.asarray(True), within, sent)}
    return metrics, cotangent, add(accumulated, total, fresh), state


def _above(*within: jax.Array) -> jax.Array:
    """Returns how many activations, gradients and cotangents are not within their clips."""
    return jnp.stack([jnp.sum(~some, dtype=jnp.int32) for some in within])


def _at(draw: MicroBatchContext, position: jax.Array) -> MicroBatchContext:
    """Returns the scalars of a single example of a micro-batch."""
    return draw._replace(position=draw.position + position)  # type: ignore[arg-type]


def _sum_of_clipped(
    gradient: Callable[[PyTree, jax.Array], tuple[Variables, PyTree]],
    examples: PyTree,
    clip: Any,
    params: Variables,
) -> tuple[Variables, jax.Array, PyTree]:
    """Sums per-example gradients, each clipped over all of its arrays together.

    Args:
      gradient: From an example, as a batch of one, and its position to its gradient and what else
        is wanted of it.
      examples: Arrays [examples, …].
      clip: The bound of an example's norm.
      params: The weights.

    Returns:
      The sum, which of the gradients were within the bound [examples], and what else was wanted,
      stacked [examples, …].
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    piece = examples_at_a_time(params, count)

    def one(example: PyTree, position: jax.Array) -> tuple[Variables, PyTree]:
        alone = jax.tree.map(lambda array: array[None], example)
        found, rest = gradient(alone, position)
        clipped, within = bound_tree(found, clip)
        return clipped, (within, rest)

    def some(examples: PyTree, positions: jax.Array) -> tuple[Variables, PyTree]:
        gradients, rest = jax.vmap(one)(examples, positions)
        return jax.tree.map(lambda array: jnp.sum(array, axis=0), gradients), rest

    def body(total: Variables, part: PyTree) -> tuple[Variables, PyTree]:
        found, rest = some(*part)
        return jax.tree.map(jnp.add, total, found), rest

    positions = jnp.arange(count, dtype=jnp.uint32)
    whole = count // piece * piece
    total: Variables = jax.tree.map(jnp.zeros_like, params)
    stacked: list[PyTree] = []
    if whole:
        pieces = jax.tree.map(
            lambda array: array[:whole].reshape((whole // piece, piece, *array.shape[1:])),
            (examples, positions),
        )
        total, rest = jax.lax.scan(body, total, pieces)
        stacked.append(jax.tree.map(lambda array: array.reshape((whole, *array.shape[2:])), rest))
    if whole < count:
        ragged = jax.tree.map(lambda array: array[whole:], (examples, positions))
        total, rest = body(total, ragged)
        stacked.append(rest)
    within, rest = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked)
    return total, within, rest


def examples_at_a_time(params: Variables, count: int) -> int:
    """Returns of how many examples the gradients exist at a time.

    One on a CPU, which works through examples one after another in any case: gradients of several
    kernels at once are grouped convolutions, for which XLA has a naive loop, and those of dense
    layers are batched products, which it computes no better. A step of 100 examples took 5.4 s
    with 64 at a time and takes 0.17 one by one for VGG-5, 27 and 0.11 s for two layers of 1,024.
    """
    if jax.default_backend() == "cpu":
        return 1
    nbytes: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return max(1, min(count, MOST_EXAMPLES, PIECE_BYTES // max(nbytes, 1)))


def clip_tree(tree: PyTree, clip: Any) -> PyTree:
    """Scales a tree of arrays to a norm of at most a bound; what is not finite becomes zero.

    Args:
      tree: The arrays.
      clip: The bound of their common Euclidean norm.
    """
    return bound_tree(tree, clip)[0]


def bound_tree(tree: PyTree, clip: Any) -> tuple[PyTree, jax.Array]:
    """Returns what ``clip_tree`` returns, and whether the tree was within the bound, a bool."""
    squared = tree_norm_squared(tree)
    finite = jnp.isfinite(squared)
    margin = min((_margin(leaf.dtype) for leaf in jax.tree.leaves(tree)), default=1.0)
    bound = jnp.asarray(clip, squared.dtype) * margin
    within = squared <= jnp.square(bound)  # false where it is not finite
    scaled = bound * jax.lax.rsqrt(jnp.maximum(squared, bound**2))
    scale = jnp.where(finite & ~within, scaled, 1.0)
    clipped = jax.tree.map(
        lambda leaf: jnp.where(finite, leaf, 0) * jnp.asarray(scale, leaf.dtype), tree
    )
    return clipped, within


def tree_norm_squared(tree: PyTree) -> jax.Array:
    """Returns the squared Euclidean norm of all arrays together, at least in float32."""
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.asarray(sum(squares, start=jnp.zeros((), jnp.float32)))
