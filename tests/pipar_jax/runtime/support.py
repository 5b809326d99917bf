"""Small runs on one machine, all hosts as threads, and the centralised training they must equal."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stages
from pipar_jax.config import Config
from pipar_jax.data import Dataset, Examples, admit
from pipar_jax.data.loader import Loader
from pipar_jax.data.types import computed
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve

SHAPE, CLASSES = (8, 8, 1), 10


def dataset(samples: int, seed: int, test: int = 0) -> Dataset:
    """Random images and labels: what equality needs is numbers, not meaning."""
    rng = np.random.default_rng(seed)

    def split(n: int) -> Examples:
        images = rng.normal(size=(n, *SHAPE)).astype(np.float32)
        return Examples.of(images, rng.integers(0, CLASSES, n).astype(np.int32))

    return Dataset("test", split(samples), split(test), CLASSES)


def datasets(samples: tuple[int, ...]) -> list[Dataset]:
    """One data set per device, and the test set."""
    return [dataset(n, i) for i, n in enumerate(samples)] + [dataset(0, 99, test=16)]


def config(folder, samples, *, name="mlp", dtype="float64", batch=7, method="pipar") -> Config:
    made = Config(name="run", method=method, epochs=1)
    made.model.name, made.model.norm, made.model.dtype = name, "group", dtype
    made.data.batch_size = batch
    made.devices.count = len(samples)
    made.run.dir = str(folder)
    made.run.evaluate_every = 0
    made.network.deadline_s = (
        60.0  # all hosts compile in one process, on a machine that may be busy
    )
    made.optimizer.learning_rate = 0.05
    made.optimizer.momentum = 0.0
    made.aggregation.every = "1 steps"
    return made


@functools.cache
def model(name: str = "mlp", dtype: str = "float64", norm: str = "group") -> stages.Model:
    """A registered model, one for all tests: they share what it has compiled."""
    return stages.build(name, input_shape=SHAPE, classes=CLASSES, norm=norm, dtype=dtype)


class Layer(nnx.Module):
    """A small dense layer, so that a chain can be long and cheap."""

    def __init__(self, inputs, outputs, rngs, *, last=False):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=np.float64)
        self.last = last

    def __call__(self, x):
        y = self.linear(x.reshape(x.shape[0], -1))
        return y if self.last else nnx.tanh(y)


class Dense(nnx.Module):
    """A dense layer in float64 on the last axis, whatever is before it."""

    def __init__(self, inputs, outputs, rngs):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=np.float64)

    def __call__(self, x):
        return nnx.tanh(self.linear(x)) * 2


def admitted(pair, network) -> Dataset:
    """A pair of inputs and targets as a host takes them, in both splits."""
    made = admit(pair, "train", "data", network.task.targets)
    return dataclasses.replace(made, test=made.train)


@functools.cache
def chain() -> stages.Model:
    """A model of six units in float64, one for all tests; jax must allow that."""

    def layer(inputs, outputs, last=False):
        return lambda rngs: Layer(inputs, outputs, rngs, last=last)

    widths = [64, 12, 11, 10, 9, 8]
    units = [(f"fc{i + 1}", layer(a, b)) for i, (a, b) in enumerate(itertools.pairwise(widths))]
    units.append(("out", layer(8, 10, last=True)))
    return stages.Model.from_units("chain", units, SHAPE, CLASSES, input_dtype=np.float64)


def trained(made: Config, samples, network=None, events=None):
    """Runs and returns the global weights as numpy, {unit: {path: array}}."""
    found = events.append if events is not None else (lambda event: None)
    names = () if network is None else (made.model.name,)  # what is known of it does not count
    resolved = resolve(made, models=names)
    return load(run_here(resolved, network, datasets(samples), on_event=found), network)


def batches(made: Config, samples) -> list[Loader]:
    return [
        Loader(one.train, None, made.data.batch_size, seed=made.seed, device=i)
        for i, one in enumerate(datasets(samples)[:-1])
    ]


def centralised(made: Config, network, groups, tx=None, *, weight_decay=0.0):
    """Plain optax training on given mini-batches; knows nothing of stages, cuts or hosts.

    Args:
      made: Where seed and optimiser come from.
      network: The whole model, with group normalisation.
      groups: For each step the list of batches whose union is the mini-batch.
      tx: The optimiser, on all weights at once; None: SGD with the configured momentum.
      weight_decay: The default optimiser's.
    """
    dtype = np.dtype(made.model.dtype)
    given = [
        (
            computed(np.concatenate([one.x for one in group]), dtype),
            np.concatenate([one.targets["y"] for one in group]),
            {
                name: computed(np.concatenate([one.sides[name] for one in group]), dtype)
                for name in group[0].sides
            },
        )
        for group in groups
    ]
    if tx is not None:
        return _centralised(network, made.seed, given, tx)
    rate, momentum = made.optimizer.learning_rate, made.optimizer.momentum
    # However the model was cut, what it must equal is the same.
    known = network, made.seed, rate, momentum, weight_decay, _hash(given)
    if known not in _KNOWN:
        tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum or None))
        _KNOWN[known] = _centralised(network, made.seed, given, tx)
    return _KNOWN[known]


_KNOWN: dict = {}


def _hash(batches) -> str:
    found = hashlib.sha256()
    for x, labels, sides in batches:
        found.update(f"{x.dtype}{x.shape}".encode() + x.tobytes() + labels.tobytes())
        found.update(b"".join(sides[name].tobytes() for name in sorted(sides)))
    return found.hexdigest()


def _centralised(network, seed, batches, tx):
    params, state = network.init(seed)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, labels, sides):
        def loss(params):
            logits = stages.predict(network, params, state, x, sides)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches:
        params, opt_state = step(params, opt_state, *jax.tree.map(jnp.asarray, batch))
    return params


def clip(norm: float, parts) -> optax.GradientTransformation:
    """Clips the gradient of each run of units by itself, such as that of units 0 and 1."""
    one = optax.clip_by_global_norm(norm)

    def update(updates, state, params=None):
        names, clipped = list(updates), {}
        for first, stop in itertools.pairwise(parts):
            clipped |= one.update({name: updates[name] for name in names[first:stop]}, state)[0]
        return clipped, state

    return optax.GradientTransformation(one.init, update)


def largest_difference(actual, expected) -> float:
    """The largest difference, relative to the largest element of its array."""
    worst = 0.0
    for unit, arrays in expected.items():
        for path, wanted in arrays.items():
            got, wanted = np.asarray(actual[unit][path]), np.asarray(wanted)
            assert got.shape == wanted.shape
            worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    return worst


class Crash(Exception):
    """Ends a run as a bug or a lost machine does."""


def crash(made: Config, samples, after: int, network=None) -> None:
    """Runs until a round is over, and ends the server then, before it keeps anything more.

    Args:
      made: The configuration.
      samples: Samples of each device.
      after: The round.
      network: The model, if not the configured one.
    """

    def tell(event):
        if event["event"] == "round_finished" and event["round"] == after:
            raise Crash

    names = () if network is None else (made.model.name,)
    with pytest.raises(Crash):
        run_here(resolve(made, models=names), network, datasets(samples), on_event=tell)
