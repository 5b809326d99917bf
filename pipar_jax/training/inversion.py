"""A decoder from activations to the images they were made of: what an attacker would train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from comms.arrays import Array

#: Width of the bottleneck through which every pixel sees the whole activation; channels.
BOTTLENECK, CHANNELS = 256, 16
LEARNING_RATE, BATCH = 2e-3, 64

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A trained decoder.

    Attributes:
      weights: Its weights by name.
      scale: Root mean square of the activations that it was trained on.
      mean: [height, width, channels] mean of the images: its guess where it cannot tell anything.
    """

    weights: Weights
    scale: float
    mean: Array

    def reconstruct(self, activations: Array) -> Array:
        """Returns images [samples, height, width, channels] from 0 to 1 for activations."""
        seen = jnp.asarray(activations, jnp.float32) / self.scale
        made = _decode(self.weights, seen, jnp.asarray(self.mean))
        return np.asarray(jnp.clip(made, 0, 1))


def train_decoder(
    observe: Callable[[np.ndarray[tuple[int], np.dtype[np.intp]]], Array],
    images: Array,
    *,
    steps: int,
    seed: int = 0,
) -> Decoder:
    """Trains a decoder on images that the attacker knows.

    Args:
      observe: From positions of images to what a device would send of them, [samples, …], with new
        noise at every call.
      images: [images, height, width, channels] float32 from 0 to 1.
      steps: Steps of Adam, with a learning rate that falls to 0.
      seed: Seed of the first weights and of the order of images.
    """
    generator = np.random.default_rng(seed)
    count = min(BATCH, len(images))
    first = np.asarray(observe(generator.integers(0, len(images), count)), np.float32)
    scale = float(np.sqrt(np.mean(np.square(first)))) or 1.0
    mean = images.mean(axis=0)
    weights = _draw(jax.random.key(seed), first.shape[1:], images.shape[1:])
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, max(steps, 1)))
    opt_state = optimizer.init(weights)
    step = jax.jit(partial(_step, optimizer))
    for _ in range(steps):
        chosen = generator.integers(0, len(images), count)
        seen = jnp.asarray(observe(chosen), jnp.float32) / scale
        weights, opt_state = step(weights, opt_state, seen, images[chosen], mean)
    return Decoder(weights, scale, mean)


def _draw(key: jax.Array, seen: tuple[int, ...], image: tuple[int, ...]) -> Weights:
    """Returns first weights; with the last layer's the decoder's output is the mean image."""
    height, width = -(-image[0] // 4), -(-image[1] // 4)
    spatial = len(seen) == 3
    shapes = {
        "narrow": (int(np.prod(seen)), BOTTLENECK),
        "wide": (BOTTLENECK, height * width * CHANNELS),
        "first": (3, 3, CHANNELS * (2 if spatial else 1), CHANNELS),
        "second": (3, 3, CHANNELS, CHANNELS),
        "last": (3, 3, CHANNELS, image[-1]),
    }
    if spatial:
        shapes["local"] = (3, 3, seen[-1], CHANNELS)
    initial = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(shapes))
    made = {
        name: jnp.zeros(shape) if name == "last" else initial(one, shape)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return made | {f"{name} bias": jnp.zeros(shape[-1]) for name, shape in shapes.items()}


def _decode(weights: Weights, seen: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns images [samples, height, width, channels] for activations of scale 1."""
    count, (height, width, _) = len(seen), mean.shape
    narrow = jax.nn.relu(seen.reshape(count, -1) @ weights["narrow"] + weights["narrow bias"])
    wide = jax.nn.relu(narrow @ weights["wide"] + weights["wide bias"])
    coarse = wide.reshape(count, -(-height // 4), -(-width // 4), CHANNELS)
    y = jax.image.resize(coarse, (count, height, width, CHANNELS), "linear")
    if "local" in weights:
        local = jax.nn.relu(_convolve(weights, "local", seen))
        local = jax.image.resize(local, (count, height, width, CHANNELS), "linear")
        y = jnp.concatenate([y, local], axis=-1)
    y = jax.nn.relu(_convolve(weights, "first", y))
    y = jax.nn.relu(_convolve(weights, "second", y))
    return mean + _convolve(weights, "last", y)


def _convolve(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, weights[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + weights[f"{name} bias"]


def _step(
    optimizer: optax.GradientTransformation,
    weights: Weights,
    opt_state: optax.OptState,
    seen: jax.Array,
    images: jax.Array,
    mean: jax.Array,
) -> tuple[Weights, optax.OptState]:
    def error(weights: Weights) -> jax.Array:
        return jnp.mean(jnp.square(_decode(weights, seen, mean) - images))

    updates, opt_state = optimizer.update(jax.grad(error)(weights), opt_state, weights)
    return optax.apply_updates(weights, updates), opt_state  # type: ignore[return-value]
