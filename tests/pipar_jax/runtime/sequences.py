"""Sequences of different lengths, networks that read them, and unpadded training in one place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stages
from pipar_jax.config import Config
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import Dataset, admit
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import Run, load
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.participants import make_loader
from stages.lengths import padded_to
from stages.tasks.per_sample import losses_of
from tests.pipar_jax.runtime import support

TOKENS, LONGEST, WIDTH, CLASSES = 7, 6, 4, 3
PAD_TO = "3,6"
SAMPLES, BATCH = (8, 12), 4
TASKS = {"reader": "classification", "writer": "language"}


class Reader(nnx.Module):
    """Reads sequences: an LSTM to each one's last token, and a class."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kind = {"param_dtype": jnp.float64, "rngs": rngs}
        self.embed = nnx.Embed(TOKENS, WIDTH, **kind)
        self.mix = nnx.Linear(WIDTH, WIDTH, **kind)
        self.lstm = nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, **kind))
        self.head = nnx.Linear(WIDTH, CLASSES, **kind)

    def __call__(self, tokens, lengths):
        x = self.lstm(nnx.tanh(self.mix(self.embed(tokens))), seq_lengths=lengths)
        return self.head(x[jnp.arange(len(lengths)), lengths - 1])


class Writer(nnx.Module):
    """Says a token for each position: attention under a mask, in both directions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kind = {"param_dtype": jnp.float64, "rngs": rngs}
        self.embed = nnx.Embed(TOKENS, WIDTH, **kind)
        # Without biases: that of the keys has no gradient but rounding, which no other equals.
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, use_bias=False, **kind)
        self.mix = nnx.Linear(WIDTH, WIDTH, **kind)
        self.head = nnx.Linear(WIDTH, TOKENS, **kind)

    def __call__(self, tokens, mask):
        x = self.attend(self.embed(tokens), mask=mask[:, None, None, :])
        return self.head(nnx.tanh(self.mix(x)))


def network(name: str) -> stages.Model:
    """One of both, for its task; jax must allow float64."""
    side = {"reader": ("lengths", jnp.ones(1, jnp.int32)),
            "writer": ("mask", jnp.ones((1, LONGEST), bool))}[name]  # fmt: skip
    example = dict([("", jnp.ones((1, LONGEST), jnp.int32)), side])
    factory = {"reader": Reader, "writer": Writer}[name]
    return stages.trace(factory, example, name=name).for_task(stages.make_task(TASKS[name]))


def examples(name: str, samples: int, seed: int) -> tuple[dict, list]:
    """Random sequences as a program has them: lists of arrays of different lengths."""
    rng = np.random.default_rng(seed)
    # Most are short, so that there are mini-batches of each length.
    lengths = rng.choice([1, 2, 3, 4, 5, 6], samples, p=[0.4, 0.3, 0.2, 0.04, 0.03, 0.03])
    tokens = [rng.integers(0, TOKENS, n) for n in lengths]
    if name == "reader":
        return {"x": tokens, "lengths": lengths}, list(rng.integers(0, CLASSES, samples))
    following = [rng.integers(0, TOKENS, n) for n in lengths]
    return {"x": tokens, "mask": [np.ones(n, bool) for n in lengths]}, following


def pairs(name: str, samples=SAMPLES) -> list:
    """The data as a program passes them: per device a pair, and one for the test."""
    return [examples(name, n, i) for i, n in enumerate([*samples, 6])]


def setting(folder, method: str, samples=SAMPLES, pad_to: str = PAD_TO) -> Config:
    made = support.config(folder, samples, method=method, batch=BATCH)
    made.data.pad_to = pad_to
    chosen = METHODS[method]
    made.pipeline.cut, made.pipeline.micro_batches = 2, 2 if chosen.cuts else 1
    if chosen.uses_nodes:
        made.nodes.count, made.pipeline.cuts = 2, "1,2,3" if chosen.labels_home else "1,2"
    return made


def samples_of(method: str) -> tuple[int, ...]:
    return SAMPLES[1:] if METHODS[method].one_device else SAMPLES


def trained(made: Config, own: stages.Model, samples, on_event=lambda event: None) -> Run:
    resolved = resolve(made, models=(made.model.name,), reads_data=False)
    return load(run_here(resolved, own, pairs(own.name, samples), on_event=on_event), own)


def datasets(made: Config, name: str, samples) -> list[Dataset]:
    """What the devices train on."""
    rule, pad_to = stages.make_task(TASKS[name]).targets, whole_numbers(made.data.pad_to)
    some = pairs(name, samples)[:-1]
    return [
        admit(one, "train", f"d{i}", rule, CLASSES if name == "reader" else TOKENS, pad_to=pad_to)
        for i, one in enumerate(some)
    ]


def loaders(made: Config, name: str, samples) -> list:
    return [
        make_loader(made.data, made.seed, i, one)
        for i, one in enumerate(datasets(made, name, samples))
    ]


def steps_of(method: str, devices) -> list[list]:
    """The mini-batches of each step in one place."""
    if method == "sl":
        return [[one.batch(step)] for one in devices for step in range(one.steps_per_epoch)]
    steps = max(one.steps_per_epoch for one in devices)
    return [[one.batch(step) for one in devices] for step in range(steps)]


@functools.cache
def _unpadded_network(name: str):
    """A network for samples of any length, and its gradient for one; the same for all tests."""
    own = padded_to(network(name), range(1, LONGEST + 1))
    _, state = own.init(0)

    @jax.jit
    def gradient(params, x, sides, y):
        def loss(params):
            return losses_of(own.task, stages.predict(own, params, state, x, sides), y).sum()

        return jax.grad(loss)(params)

    return own, gradient


def centralised(made: Config, name: str, groups):
    """Training in one place in which no sample is padded at all: each is read by itself."""
    own, gradient = _unpadded_network(name)
    params, _ = own.init(made.seed)
    tx = optax.sgd(made.optimizer.learning_rate)
    opt_state = tx.init(params)
    for group in groups:
        alone = [one for batch in group for one in _unpadded(name, batch)]
        gradients = [gradient(params, *sample) for sample in alone]
        mean = jax.tree.map(lambda *some: sum(some) / len(some), *gradients)
        updates, opt_state = tx.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def _unpadded(name: str, batch):
    for i, x in enumerate(batch.x):
        if name == "reader":
            length = int(batch.sides["lengths"][i])
            sides, y = {"lengths": np.asarray([length], np.int32)}, batch.targets["y"][i : i + 1]
        else:
            length = int(batch.sides["mask"][i].sum())
            sides = {"mask": np.ones((1, length), bool)}
            y = batch.targets["y"][i : i + 1, :length]
        yield x[None, :length], sides, y.astype(np.int32)
