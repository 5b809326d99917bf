"""Losses and metrics of samples, as jax computes them. Nothing here reduces over samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from stages.tasks.targets import MASKED


def widened(outputs: jax.Array) -> jax.Array:
    """Returns outputs as float32 or wider."""
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def positions_mean(values: jax.Array) -> jax.Array:
    """Returns the mean over all axes but the first, [samples]."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _positions_sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> jax.Array:
    """Returns the softmax cross entropy of each sample, [samples].

    Args:
      logits: [samples, …, classes]; 16-bit ones are widened to float32 first.
      labels: [samples, …] int32. Where a sample has several (positions), its loss is their mean.
      smoothing: Share of the probability that is spread evenly over all classes.
      class_weights: For each class the factor of its samples' losses; empty: 1.
    """
    logits = widened(logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        even = -jnp.mean(jax.nn.log_softmax(logits, axis=-1), axis=-1)
        losses = (1.0 - smoothing) * losses + smoothing * even
    if class_weights:
        losses = losses * jnp.asarray(class_weights, losses.dtype)[labels]
    return positions_mean(losses)


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of a sample's positions whose largest logit is the label's, [samples]."""
    logits = widened(logits)
    return positions_mean((jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype))


def top_hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns the share of a sample's positions whose label is among the k largest, [samples]."""
    logits = widened(logits)
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    above = jnp.sum(logits > own, axis=-1)
    return positions_mean((above < k).astype(logits.dtype))


def token_loss(
    logits: jax.Array, tokens: jax.Array, by_token: bool, positions: int = 0
) -> jax.Array:
    """Returns the cross entropy of each sequence over the positions that count, [samples].

    Args:
      logits: [samples, positions, vocabulary].
      tokens: [samples, positions] int32; MASKED where a position does not count.
      by_token: Whether the sum over these positions is divided by the length of the padded
        sequence, so that each token counts the same; otherwise by how many of them there are,
        so that each sequence does.
      positions: by_token: what the sum is divided by; 0 for the length of the padded sequence.
    """
    total, count = token_sums(logits, tokens)
    if by_token:
        return total / (positions or tokens.size // tokens.shape[0])
    return total / jnp.maximum(count, 1)


def token_sums(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of each sequence's cross entropies and the number of positions in it."""
    logits, counts = widened(logits), tokens != MASKED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, tokens, 0))
    return _positions_sum(jnp.where(counts, losses, 0)), _positions_sum(counts.astype(losses.dtype))


def token_hits(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how many tokens of each sequence have the largest logit, and how many count."""
    counts = tokens != MASKED
    right = (jnp.argmax(logits, axis=-1) == tokens) & counts
    dtype = widened(logits).dtype
    return _positions_sum(right.astype(dtype)), _positions_sum(counts.astype(dtype))


def sigmoid_loss(logits: jax.Array, targets: jax.Array, positive_weight: float) -> jax.Array:
    """Returns the mean sigmoid cross entropy of each sample's outputs, [samples].

    Args:
      logits: [samples, …].
      targets: The same shape, in [0, 1].
      positive_weight: Factor of the losses of positive targets.
    """
    logits = widened(logits)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
    if positive_weight != 1.0:
        losses = losses * (1.0 + (positive_weight - 1.0) * targets.astype(logits.dtype))
    return positions_mean(losses)


def decided(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns which outputs and which targets are positive, bool, the same shape each."""
    return logits > 0, targets > 0.5


def agreement(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the share of each sample's outputs that are on the right side, [samples]."""
    said, true = decided(logits, targets)
    return positions_mean((said == true).astype(widened(logits).dtype))


def all_agree(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns whether all of a sample's outputs are on the right side, 0 or 1, [samples]."""
    said, true = decided(logits, targets)
    right = jnp.all(said == true, axis=tuple(range(1, said.ndim)))
    return right.astype(widened(logits).dtype)


def positives(
    logits: jax.Array, targets: jax.Array, among_targets: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns each sample's true positives, and its positive targets or outputs, [samples].

    Args:
      logits: [samples, …].
      targets: The same shape.
      among_targets: Whether positive targets are counted (recall) or positive outputs (precision).
    """
    said, true = decided(logits, targets)
    dtype = widened(logits).dtype
    right = _positions_sum((said & true).astype(dtype))
    return right, _positions_sum((true if among_targets else said).astype(dtype))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean squared error of each sample's outputs, [samples]."""
    outputs = widened(outputs)
    return positions_mean(jnp.square(outputs - targets.astype(outputs.dtype)))


def absolute_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean absolute error of each sample's outputs, [samples]."""
    outputs = widened(outputs)
    return positions_mean(jnp.abs(outputs - targets.astype(outputs.dtype)))


def huber(outputs: jax.Array, targets: jax.Array, delta: float) -> jax.Array:
    """Returns the mean Huber loss of each sample's outputs, [samples]."""
    outputs = widened(outputs)
    return positions_mean(optax.huber_loss(outputs, targets.astype(outputs.dtype), delta=delta))
