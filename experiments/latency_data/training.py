"""Trains the shared network on times of layers, together with the devices' embeddings.

The loss is Huber's on the logarithm of predicted over measured seconds of a whole layer, whose
operators' times are summed; those of published tables have a small weight. Embeddings are
regularised towards zero; their distribution over the devices is the prior of new devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from experiments.latency_data.published_tables import FAMILY
from experiments.latency_data.timings import Timings
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.latency_model import FACTORS, Weights, apply, flatten, fresh
from pipar_jax.profiling.predictor.operators import KINDS, Array, features

#: Number of updates, peak learning rate, and threshold of Huber's loss.
STEPS, LEARNING_RATE, DELTA = 3000, 6e-3, 0.15
#: Weight of a published time relative to ours: it was measured with another framework, and its
#: operators are known only from the names of rows.
TABLE_WEIGHT = 0.1
#: Regularisation of embeddings and weights.
EMBEDDING_DECAY, WEIGHT_DECAY = 3e-3, 1e-4
#: Prior standard deviation of the scale: devices differ by orders of magnitude.
SCALE_DEVIATION = 3.0
#: Initial operations and bytes per second, to which the network learns corrections.
START_S = 20.0


def train(timings: Timings, *, seed: int = 0, steps: int = STEPS, about: str = "") -> Weights:
    """Returns a network trained on all times of a data set.

    Args:
      timings: The measured times.
      seed: Seed of the initial weights and embeddings.
      steps: Number of updates, each on all times.
      about: Description, saved with the weights.

    Raises:
      DataError: There is no time to learn from.
    """
    used = [i for i, one in enumerate(timings.layers) if len(one.operators)]
    table = np.concatenate([timings.layers[i].operators for i in used] or [np.zeros((0, 1))])
    tables = np.stack([timings.forward_s[:, used], timings.backward_s[:, used]])
    known = np.isfinite(tables) & (tables > 0)
    if not known.any():
        raise DataError("the data set has no times of layers: collect some first")
    seen = features(table)
    shift, scale = seen.mean(0), np.maximum(seen.std(0), 0.1)
    owner = np.repeat(np.arange(len(used)), [len(timings.layers[i].operators) for i in used])
    x = jnp.asarray((seen - shift) / scale, jnp.float32)
    wanted = jnp.asarray(np.log(np.where(known, tables, 1.0)), jnp.float32)
    mask = _shares(known, timings)

    devices = len(timings.devices)
    rng = np.random.default_rng(seed)
    logs = np.log(np.where(known, tables, np.nan))
    variables: dict[str, Any] = {
        "network": {name: jnp.asarray(value) for name, value in flatten(fresh(seed)).items()},
        "scale": jnp.asarray(np.nanmedian(logs, axis=(0, 2)), jnp.float32),
        "embedding": jnp.asarray(0.1 * rng.normal(size=(devices, FACTORS)), jnp.float32),
    }

    def loss(variables: dict[str, Any]) -> jax.Array:
        heads, _ = apply(variables["network"], x)
        factors = jnp.einsum("hok,dk->hdo", heads[..., 1:], variables["embedding"])
        logs = heads[:, None, :, 0] + factors
        each = jnp.exp(jnp.clip(logs, -40.0, 40.0))
        total = jax.ops.segment_sum(each.transpose(2, 0, 1), owner, num_segments=len(used))
        off = jnp.log(total.transpose(1, 2, 0)) + variables["scale"][None, :, None] - wanted
        fit = jnp.sum(optax.losses.huber_loss(off, delta=DELTA) * mask)
        pull = EMBEDDING_DECAY * DELTA**2 * jnp.mean(jnp.sum(variables["embedding"] ** 2, -1))
        return fit + pull

    schedule = optax.cosine_onecycle_schedule(steps, LEARNING_RATE, 0.1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, weight_decay=WEIGHT_DECAY,
            mask={"network": True, "scale": False, "embedding": False},
        ),
    )  # fmt: skip

    @partial(jax.jit, donate_argnums=(0, 1))
    def run(variables: Any, state: Any) -> Any:
        def one(_: int, carry: Any) -> Any:
            variables, state = carry
            updates, state = tx.update(jax.grad(loss)(variables), state, variables)
            return optax.apply_updates(variables, updates), state

        return jax.lax.fori_loop(0, steps, one, (variables, state))

    variables, _ = run(variables, tx.init(variables))
    return _finished(variables, shift, scale, x, *_ranges(table[:, 0], seen), about)


def _shares(known: NDArray[np.bool_], timings: Timings) -> jax.Array:
    """Returns each time's share of the loss, [passes, devices, layers]; 0 where it is not known."""
    shares = jnp.asarray(known, jnp.float32)
    # Devices with few layers have the same weight as those with many.
    per_device = known.sum((0, 2), keepdims=True)
    shares = shares / np.sqrt(np.maximum(per_device, 1.0))
    foreign = np.asarray([device.family == FAMILY for device in timings.devices])
    shares = shares * np.where(foreign, TABLE_WEIGHT, 1.0)[None, :, None]
    made: jax.Array = shares / shares.sum()
    return made


def _ranges(kinds: Array, seen: Array) -> tuple[Array, Array]:
    """Returns the least and the largest of each feature by kind, [KINDS, FEATURES - KINDS]."""
    numbers = seen[:, len(KINDS) :]
    low = np.full((len(KINDS), numbers.shape[1]), -np.inf)
    high = -low
    for kind in np.unique(kinds).astype(int):
        mine = numbers[kinds == kind]
        low[kind], high[kind] = mine.min(0), mine.max(0)
    return low, high


def _finished(
    variables: Any, shift: Any, scale: Any, x: Any, low: Array, high: Array, about: str
) -> Weights:
    """Returns the trained network with the prior of its devices' embeddings."""
    values = {name: np.asarray(value) for name, value in variables["network"].items()}
    _, hidden = (np.asarray(one, np.float64) for one in apply(values, x))
    embedding = np.asarray(variables["embedding"], np.float64)
    scales = np.asarray(variables["scale"], np.float64)
    # The covariance of few devices is noisy: it is shrunk towards its diagonal.
    spread = np.cov(embedding.T) if len(embedding) > 1 else np.eye(FACTORS)
    diagonal = np.diag(np.diag(spread) + 1e-3)
    spread = 0.5 * spread + 0.5 * diagonal
    precision = np.zeros((1 + FACTORS, 1 + FACTORS))
    precision[0, 0] = 1.0 / SCALE_DEVIATION**2
    precision[1:, 1:] = np.linalg.inv(spread)
    return Weights(
        values, shift, scale, hidden.mean(0), np.maximum(hidden.std(0), 1e-3),
        np.concatenate([[np.median(scales)], embedding.mean(0)]), precision, low, high, about,
    )  # fmt: skip
