"""Every module of Flax NNX trains as plain Flax trains it, or is refused when the model is made."""

from __future__ import annotations

import functools
import inspect
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import stages
from pipar_jax.methods.registry import METHODS, server_methods
from tests.pipar_jax.runtime import support

#: What goes from unit to unit: tokens of a sample, and features of a token.
TOKENS, FEATURES = 4, 6
SAMPLES = (21,)
STEPS = 3


class Embedded(nnx.Module):
    """Adds an embedding of the largest feature."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x):
        return x + self.embed(jnp.argmax(x, axis=-1))


class Containers(nnx.Module):
    """Holds layers in a list and a dictionary, one of them in both, and sows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        shared = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.listed = nnx.List([shared, nnx.Linear(FEATURES, FEATURES, rngs=rngs)])
        self.named = nnx.Dict({"again": shared, "a/b": nnx.PReLU()})

    def __call__(self, x):
        for layer in (*self.listed, self.named["again"], self.named["a/b"]):
            x = x + layer(x)
        self.sow(nnx.Intermediate, "after", x)
        return x


class First(nnx.Module):
    """Makes tokens of an image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(64 // TOKENS, FEATURES, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x.reshape(x.shape[0], TOKENS, -1)))


class Last(nnx.Module):
    """Makes logits of tokens."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(TOKENS * FEATURES, support.CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1))


def linear(rngs):
    return nnx.Linear(FEATURES, FEATURES, rngs=rngs)


def rnn(cell, features=FEATURES, **values):
    """A network over a cell; its own initialiser of recurrent weights takes long to compile."""
    values["recurrent_kernel_init"] = nnx.initializers.lecun_normal()
    return lambda rngs: nnx.RNN(cell(FEATURES, features, rngs=rngs, **values), rngs=rngs)


def normal_carry(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype)


def both_ways(rngs):
    halves = [rnn(cell, FEATURES // 2)(rngs) for cell in (nnx.SimpleCell, nnx.GRUCell)]
    return nnx.Bidirectional(*halves, rngs=rngs)


#: How each public module is made as a unit from [batch, TOKENS, FEATURES] to the same.
TRAINED = {
    "BatchNorm": lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs),
    "Bidirectional": both_ways,
    "Conv": lambda rngs: nnx.Conv(FEATURES, FEATURES, 3, rngs=rngs),
    "ConvTranspose": lambda rngs: nnx.ConvTranspose(FEATURES, FEATURES, 3, rngs=rngs),
    "Dict": Containers,
    "Dropout": lambda rngs: nnx.Dropout(0.3, rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("btf,fg->btg", (FEATURES, FEATURES), (FEATURES,), rngs=rngs),
    "Embed": Embedded,
    "GRUCell": rnn(nnx.GRUCell),
    "GroupNorm": lambda rngs: nnx.GroupNorm(FEATURES, 2, rngs=rngs),
    "InstanceNorm": lambda rngs: nnx.InstanceNorm(FEATURES, rngs=rngs),
    "LSTMCell": rnn(nnx.LSTMCell),
    "LayerNorm": lambda rngs: nnx.LayerNorm(FEATURES, rngs=rngs),
    "Linear": linear,
    "LinearGeneral": lambda rngs: nnx.LinearGeneral(FEATURES, FEATURES, rngs=rngs),
    "List": Containers,
    "LoRA": lambda rngs: nnx.LoRA(FEATURES, 2, FEATURES, base_module=linear(rngs), rngs=rngs),
    "LoRALinear": lambda rngs: nnx.LoRALinear(FEATURES, FEATURES, lora_rank=2, rngs=rngs),
    "MultiHeadAttention": lambda rngs: nnx.MultiHeadAttention(
        2, FEATURES, dropout_rate=0.2, decode=False, rngs=rngs
    ),
    "OptimizedLSTMCell": rnn(nnx.OptimizedLSTMCell),
    "PReLU": lambda rngs: nnx.PReLU(),
    "RMSNorm": lambda rngs: nnx.RMSNorm(FEATURES, rngs=rngs),
    "RNN": rnn(nnx.SimpleCell, keep_rngs=True, carry_init=normal_carry),
    "Sequential": lambda rngs: nnx.Sequential(linear(rngs), jnp.tanh),
    "SimpleCell": rnn(nnx.SimpleCell),
    "SpectralNorm": lambda rngs: nnx.SpectralNorm(linear(rngs), rngs=rngs),
    "WeightNorm": lambda rngs: nnx.WeightNorm(linear(rngs), rngs=rngs),
    "bridge.ToNNX": lambda rngs: nnx.bridge.ToNNX(linen.Dense(FEATURES), rngs=rngs).lazy_init(
        jnp.zeros((1, TOKENS, FEATURES))
    ),
}


class Own(nnx.bridge.Module):
    """A module of Flax's bridge, which has no variables before it is initialised."""

    @nnx.bridge.compact
    def __call__(self, x):
        return x


#: What is no unit by itself, and what is said of it.
REFUSED = {
    "Dict": (lambda rngs: nnx.Dict(), "expected a callable NNX module"),
    "List": (lambda rngs: nnx.List([linear(rngs)]), "expected a callable NNX module"),
    "Module": (lambda rngs: nnx.Module(), "expected a callable NNX module"),
    "RNNCellBase": (lambda rngs: nnx.RNNCellBase(), "cannot take float32"),
    **{
        name: (functools.partial(cell, FEATURES, FEATURES), "cannot take float32.*TypeError")
        for name, cell in (
            ("GRUCell", lambda n, m, rngs: nnx.GRUCell(n, m, rngs=rngs)),
            ("LSTMCell", lambda n, m, rngs: nnx.LSTMCell(n, m, rngs=rngs)),
            ("OptimizedLSTMCell", lambda n, m, rngs: nnx.OptimizedLSTMCell(n, m, rngs=rngs)),
            ("SimpleCell", lambda n, m, rngs: nnx.SimpleCell(n, m, rngs=rngs)),
        )
    },
    "MultiHeadAttention": (
        lambda rngs: nnx.MultiHeadAttention(2, FEATURES, decode=True, rngs=rngs),
        "decode=True.*build it with decode=False",
    ),
    "linen.Dense": (lambda rngs: linen.Dense(FEATURES), "flax.linen.*ToNNX"),
    "bridge.ToNNX": (
        lambda rngs: nnx.bridge.ToNNX(linen.Dense(FEATURES), rngs=rngs),
        "cannot take.*lazy_init",
    ),
    "linen.Dropout": (
        lambda rngs: nnx.bridge.ToNNX(linen.Dropout(0.5, deterministic=False), rngs=rngs),
        "cannot take.*use no dropout and batch statistics in it",
    ),
    "linen.BatchNorm": (
        lambda rngs: nnx.bridge.ToNNX(
            linen.BatchNorm(use_running_average=False), rngs=rngs
        ).lazy_init(jnp.zeros((1, TOKENS, FEATURES))),
        "cannot take.*use no dropout and batch statistics in it",
    ),
}

#: Networks of some units each, so that few are compiled.
NETWORKS = [sorted(TRAINED)[i::3] for i in range(3)]


def public_modules(package, prefix=""):
    return {
        prefix + name
        for name, found in vars(package).items()
        if inspect.isclass(found) and issubclass(found, nnx.Module) and not name.startswith("_")
    }


def test_the_tables_know_every_module_of_flax():
    found = public_modules(nnx) | public_modules(nnx.bridge, "bridge.")
    assert found - TRAINED.keys() - REFUSED.keys() == {"bridge.Module"}


@functools.cache
def network(index: int) -> stages.Model:
    units = [("first", First), *((n.replace(".", "_"), TRAINED[n]) for n in NETWORKS[index])]
    return stages.Model.from_units("flax", [*units, ("last", Last)], support.SHAPE, support.CLASSES)


def key_of(unit, path, step):
    """The key of a random stream as the documentation says, for device 0 and seed 0."""
    key = jax.random.key(0)
    for value in (0, step, zlib.crc32(unit.encode()), zlib.crc32(path.encode()), 0):
        key = jax.random.fold_in(key, value)
    return key


def text(path):
    return "/".join(text(part) if isinstance(part, tuple) else str(part) for part in path)


def plain(model, made):
    """Trains with Flax and optax alone: weights and other variables by unit and path."""
    params, state = model.init(made.seed)
    modules = {unit.name: unit.factory(nnx.Rngs(0)) for unit in model.units}
    for name, module in modules.items():
        for path, one in nnx.iter_graph(module):
            if isinstance(one, nnx.Variable) and not isinstance(one, nnx.RngState):
                one.set_value((params[name] | state[name])[text(path)])
    graph, weights, rest = nnx.split(nnx.Dict(modules), nnx.Param, ...)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def train(weights, rest, opt, step, x, labels):
        def loss(weights):
            modules = nnx.merge(graph, weights, rest, copy=True)
            y = x
            for name in model.unit_names:
                modules[name].train()
                for path, one in nnx.iter_graph(modules[name]):
                    if isinstance(one, nnx.RngKey):
                        one.set_value(key_of(name, text(path), step))
                    elif isinstance(one, nnx.RngCount):
                        one.set_value(jnp.zeros_like(one[...]))
                y = modules[name](y)
            nnx.pop(modules, nnx.Intermediate)
            after = nnx.split(modules, nnx.Param, ...)[2]
            return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), after

        gradient, after = jax.grad(loss, has_aux=True)(weights)
        updates, opt = tx.update(gradient, opt, weights)
        return optax.apply_updates(weights, updates), after, opt

    tx = optax.sgd(made.optimizer.learning_rate)
    opt = tx.init(weights)
    (loader,) = support.batches(made, SAMPLES)
    for step in range(STEPS):
        batch = loader.batch(step)
        weights, rest, opt = train(
            weights, rest, opt, jnp.uint32(step), batch.x, batch.targets["y"]
        )
    found = {name: {} for name in modules}
    for part in (weights, rest):
        for (name, *path), leaf in nnx.to_flat_state(part):
            value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            found[name][text(tuple(path))] = value
    return found


@pytest.mark.sampled(3, 2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("cut", [1, pytest.param(0, marks=pytest.mark.soak)], ids=["cut", "whole"])
@pytest.mark.parametrize("index", range(len(NETWORKS)), ids=lambda i: "-".join(NETWORKS[i]))
def test_trains_as_plain_flax_does(index, cut, tmp_path):
    """Three steps in two rounds, cut before the last unit and whole."""
    model = network(index)
    made = support.config(tmp_path, SAMPLES, method="pipar" if cut else "fl", dtype="float32")
    made.aggregation.every = "2 steps"
    made.pipeline.cut, made.pipeline.micro_batches = len(model.units) - 1, 1
    expected = plain(model, made)
    run = support.trained(made, SAMPLES, model)
    for unit in model.units:
        for path, value in (run.params[unit.name] | run.state[unit.name]).items():
            wanted, name = expected[unit.name][path], f"{unit.name}/{path}"
            np.testing.assert_allclose(value, wanted, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_when_the_model_is_made(name):
    factory, message = REFUSED[name]
    units = [("first", First), ("unit", factory), ("last", Last)]
    with pytest.raises(stages.StageError, match=f"(?s)unit.*{message}"):
        stages.Model.from_units("flax", units, support.SHAPE, support.CLASSES)


def test_batch_normalisation_trains_by_every_method(tmp_path):
    """Over two devices; where each has one micro-batch, splitting changes nothing."""
    units = [("first", First), ("norm", TRAINED["BatchNorm"]), ("last", Last)]
    model = stages.Model.from_units("norms", units, support.SHAPE, support.CLASSES)
    samples, runs = (14, 14), {}
    for method in server_methods():
        made = support.config(tmp_path / method, samples, method=method, dtype="float32")
        made.pipeline.cut, made.pipeline.micro_batches = 2, 1
        runs[method] = support.trained(made, samples, model)
        assert np.all(runs[method].state["norm"]["var"] < 1.0)
    for method in runs:
        if METHODS[method].order == "sequential":
            continue
        for part in ("params", "state"):
            found, wanted = (getattr(runs[one], part) for one in (method, "fl"))
            assert support.largest_difference(found, wanted) < 1e-4
