"""Optimisers, schedules and rules such as a user brings: right ones, and mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import stages


def rmsprop(learning_rate, decay=0.9, momentum=0.0):
    return optax.rmsprop(learning_rate, decay=decay, momentum=momentum or None)


def listed(learning_rate, steps):
    assert steps
    return [stages.Joint(*optax.clip_by_global_norm(0.5)), optax.sgd(learning_rate)]


def injected(learning_rate):
    constants = ("b1", "b2", "eps", "eps_root")
    return optax.inject_hyperparams(optax.adam, static_args=constants)(learning_rate)


def square_root(learning_rate, power=0.5, steps=1):
    return lambda count: learning_rate * (1 - count / (steps + 1)) ** power


def lookalike(learning_rate):
    return optax.GradientTransformation(lambda params: (), lambda updates, state: (updates, state))


def scalar(learning_rate):
    return optax.GradientTransformation(
        lambda params: (), lambda updates, state, params: (jnp.zeros(()), state)
    )


def counting(learning_rate):
    """Its state is whole numbers at first, and fractions later."""

    def update(updates, state, params):
        slower = jax.tree.map(lambda u, s: 0.9 * s + u, updates, state)
        return jax.tree.map(lambda s: -learning_rate * s, slower), slower

    init = jax.tree_util.Partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, jnp.int32))
    return optax.GradientTransformation(init, update)


def keyed(learning_rate):
    return optax.GradientTransformation(
        lambda params: jax.random.key(0), lambda updates, state, params: (updates, state)
    )


def fails(learning_rate):
    def update(updates, state, params):
        raise ValueError("no such moment")

    return optax.GradientTransformation(lambda params: (), update)


def nothing(learning_rate=0.0):
    return None


def ratesless():
    return optax.sgd(0.1)


def vector(learning_rate):
    return lambda count: jnp.ones(3) * learning_rate


def median():
    """The median of the replicas, whatever their weights."""
    return lambda deltas, weights: jax.tree.map(lambda d: jnp.median(d, axis=0), deltas)


def mean():
    """FedAvg, as a function of all replicas."""
    return lambda deltas, weights: jax.tree.map(lambda d: jnp.tensordot(weights, d, 1), deltas)


def adam_of_server(learning_rate, beta2):
    return optax.adam(learning_rate, b2=beta2)


def first():
    return lambda deltas, weights: deltas


def breaks():
    def combine(deltas, weights):
        raise ValueError("no replicas")

    return combine


def warm(learning_rate, steps):
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, 4, steps)


def patient(learning_rate, steps):
    assert steps > 4, f"{steps} steps are too few"
    return optax.sgd(learning_rate)
