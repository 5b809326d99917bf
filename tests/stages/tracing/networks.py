"""Small networks of the kinds that users bring, as Flax writes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx


class Cnn(nnx.Module):
    """The CNN of Flax's MNIST example, with narrow layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 2, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(2, 3, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(12, 5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.linear2(nnx.relu(self.linear1(x)))


class Residual(nnx.Module):
    """Two residual blocks with batch normalisation."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class ResidualBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(2, 2, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(2, rngs=rngs)
        self.conv2 = nnx.Conv(2, 2, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class Lstm(nnx.Module):
    """Classifies sequences; with lengths, by the last step of each."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 3, rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs), time_major=True)
        self.second = nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs), time_major=True)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens, lengths=None):
        x = jnp.swapaxes(self.embed(tokens), 0, 1)
        x = self.second(self.lstm(x, seq_lengths=lengths), seq_lengths=lengths)
        last = x[-1] if lengths is None else x[lengths - 1, jnp.arange(len(lengths))]
        return self.head(last)


class UNet(nnx.Module):
    """Two scales with a connection across."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enter = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.down = nnx.Conv(2, 2, (3, 3), strides=2, rngs=rngs)
        self.deep = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(2, 2, (2, 2), strides=2, rngs=rngs)
        self.join = nnx.Conv(4, 2, (3, 3), rngs=rngs)
        self.leave = nnx.Conv(2, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        wide = nnx.relu(self.enter(x))
        deep = nnx.relu(self.up(nnx.relu(self.deep(nnx.relu(self.down(wide))))))
        return self.leave(nnx.relu(self.join(jnp.concatenate([wide, deep], -1)))).mean((1, 2))


class Dropped(nnx.Module):
    """A perceptron with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(4, 6, rngs=rngs)
        self.two = nnx.Linear(6, 6, rngs=rngs)
        self.three = nnx.Linear(6, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.one(x)))
        return self.three(self.drop(nnx.relu(self.two(x))))


class Tied(nnx.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.two = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(nnx.gelu(self.two(nnx.gelu(self.one(self.embed(tokens))))))


class TiedInside(nnx.Module):
    """A layer used twice between others."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.twice = nnx.Linear(5, 5, rngs=rngs)
        self.between = nnx.Linear(5, 5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.twice(nnx.relu(self.first(x))))
        return self.last(nnx.relu(self.twice(nnx.tanh(self.between(x)))))


class Branches(nnx.Module):
    """Two branches of one stem with batch normalisation, joined."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.left = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.right = nnx.Conv(2, 2, (1, 1), rngs=rngs)
        self.joined = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = jnp.concatenate([nnx.relu(self.left(x)), nnx.tanh(self.right(x))], -1)
        # Without tanh a batch of one would have a constant mean, and gradients of rounding alone.
        return self.head(nnx.tanh(self.joined(x)).mean((1, 2)))


class LinenBlock(linen.Module):
    """A transformer block of Linen, with dropout."""

    @linen.compact
    def __call__(self, x, mask=None, *, deterministic: bool):
        y = linen.LayerNorm()(x)
        y = linen.MultiHeadDotProductAttention(num_heads=2)(y, y, mask=mask)
        x = x + linen.Dropout(0.3)(y, deterministic=deterministic)
        y = linen.gelu(linen.Dense(8)(linen.LayerNorm()(x)))
        return x + linen.Dense(4)(y)


class LinenEncoder(linen.Module):
    """Tokens, a block and a head."""

    @linen.compact
    def __call__(self, tokens, mask=None, *, deterministic: bool):
        x = linen.Embed(7, 4)(tokens)
        x = x + self.param("positions", linen.initializers.normal(), (1, 5, 4))
        x = LinenBlock()(x, mask, deterministic=deterministic)
        return linen.Dense(3)(x.mean(1))


class LinenNorm(linen.Module):
    """Convolutions of Linen with batch normalisation."""

    @linen.compact
    def __call__(self, x, train: bool):
        for _ in range(2):
            x = linen.Conv(2, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        return linen.Dense(3)(x.mean((1, 2)))


class Normed(nnx.Module):
    """A layer with batch normalisation."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))

    @nnx.jit
    def jitted(self, x):
        return self(x)


class Transformed(nnx.Module):
    """Layers under Flax's transforms, which write all variables back; and somebody who looks on."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one, self.two = Normed(rngs), Normed(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.remat(Normed.__call__)(self.one, x)
        jax.debug.callback(lambda mean: None, jnp.abs(x).mean())
        return self.head(self.two.jitted(x))


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=(0,), out_axes=0)
def three(rngs: nnx.Rngs) -> Normed:
    """Makes three layers as one."""
    return Normed(rngs)


class Ensemble(nnx.Module):
    """Layers side by side, mapped."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.three = three(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)
        return self.head(mapped(self.three, self.first(x)).mean(0))


class Scanned(Ensemble):
    """Layers one after another, scanned."""

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return x + layer(x)

        return self.head(run(self.three, self.first(x)))


class LinenWeights(linen.Module):
    """Layers of Linen that normalise weights: their variables have slashes in their names."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.relu(linen.WeightNorm(linen.Dense(5))(x))
        x = linen.relu(linen.SpectralNorm(linen.Dense(4))(x, update_stats=train))
        return linen.Dense(3)(x)


def layers(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Draws the parameters of `perceptron`."""
    sizes = [(4, 5), (5, 5), (5, 3)]
    keys = jax.random.split(key, len(sizes))
    return [
        {"w": jax.random.normal(k, s) / 2, "b": jnp.zeros(s[1])}
        for k, s in zip(keys, sizes, strict=True)
    ]


def perceptron(params, x):
    """A plain function of a pytree of parameters."""
    for one in params[:-1]:
        x = jax.nn.relu(x @ one["w"] + one["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


class Case(NamedTuple):
    """A network, how it is called, and the cuts it has.

    Attributes:
      network: what `trace` takes.
      example: names and abstract samples of its inputs, integers as numbers below the given one.
      cuts: number of cuts.
      params: a plain function's parameters.
    """

    network: Any
    example: dict[str, tuple[tuple[int, ...], int]]
    cuts: int
    params: Any = None


IMAGE, ROW, TOKENS = {"": ((8, 8, 1), 0)}, {"": ((4,), 0)}, {"": ((5,), 7)}
CASES: dict[str, Case] = {
    "cnn": Case(Cnn, IMAGE, 3),
    "residual": Case(Residual, IMAGE, 3),
    "lstm": Case(Lstm, TOKENS, 3),
    "lengths": Case(Lstm, {"tokens": ((5,), 7), "lengths": ((), 5)}, 3),
    "unet": Case(UNet, IMAGE, 3),
    "dropout": Case(Dropped, ROW, 2),
    "tied": Case(TiedInside, ROW, 2),
    "branches": Case(Branches, IMAGE, 4),
    "linen_encoder": Case(LinenEncoder(), TOKENS, 4),
    "linen_mask": Case(
        LinenEncoder(), {"tokens": ((5,), 7), "mask": ((1, 5, 5), 2)}, 4),
    "linen_norm": Case(LinenNorm(), IMAGE, 4),
    "function": Case(perceptron, ROW, 2, layers),
    "transformed": Case(Transformed, ROW, 3),
    "ensemble": Case(Ensemble, ROW, 3),
    "scanned": Case(Scanned, ROW, 2),
    "linen_weights": Case(LinenWeights(), ROW, 2),
}  # fmt: skip


def batch(case: Case, samples: int, seed: int = 0) -> dict[str, jax.Array]:
    """Draws a batch by name of the input."""
    random = np.random.default_rng(seed)
    found = {}
    for name, (shape, below) in case.example.items():
        size = (samples, *shape)
        if below:
            least = 1 if name == "lengths" else 0
            found[name] = jnp.asarray(random.integers(least, below + least, size), jnp.int32)
        else:
            found[name] = jnp.asarray(random.normal(size=size), jnp.float32)
    return found
