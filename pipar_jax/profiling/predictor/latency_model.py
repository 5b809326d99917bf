"""The network that all devices share: a small MLP on the features of an operator.

For a head (forward, backward) and an operator with features x it returns g(x) and h(x); on a device
with scale s and embedding z the operator takes ``exp(g(x) + s + h(x)·z)`` seconds. The time of a
layer or stage is the sum over its operators. The hidden features of the last layer are inputs of a
device's own weights (``device_fit.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipar_jax.disk.files import describe_reading, write_tensors
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.operators import FEATURES, KINDS, SIZES, Array, features
from stages.trees import Arrays

#: Size of a device's embedding and of each hidden layer.
FACTORS, HIDDEN = 6, 32
#: The trained network of the package.
SHIPPED = Path(__file__).with_name("network.safetensors")
_LEAST_ROWS = 64


class LatencyNetwork(nnx.Module):
    """An MLP with two hidden layers and two heads.

    Args:
      rngs: Random streams.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.forward = nnx.Linear(HIDDEN, 1 + FACTORS, rngs=rngs)
        self.backward = nnx.Linear(HIDDEN, 1 + FACTORS, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised features [operators, FEATURES].

        Returns:
          The heads' g and h, [2, operators, 1 + FACTORS], and the hidden features
          [operators, HIDDEN].
        """
        hidden = nnx.gelu(self.second(nnx.gelu(self.first(x))))
        return jnp.stack([self.forward(hidden), self.backward(hidden)]), hidden


class Basis(NamedTuple):
    """Outputs of the network for operators.

    Attributes:
      base: The outputs g, [2, operators] float64.
      factors: The outputs h, [2, operators, FACTORS].
      hidden: The last hidden layer, [operators, HIDDEN], of mean 0 and deviation 1.
    """

    base: Array
    factors: Array
    hidden: Array


class Weights(NamedTuple):
    """A trained network.

    Attributes:
      values: The network's parameters by path.
      shift: Subtracted from features, [FEATURES].
      scale: Divisor of features, [FEATURES].
      hidden_shift: Subtracted from hidden features, [HIDDEN].
      hidden_scale: Divisor of hidden features, [HIDDEN].
      mean: Prior mean of scale and embedding, [1 + FACTORS].
      precision: Prior precision, [1 + FACTORS, 1 + FACTORS].
      low: Minimum of each feature in the training set by kind of operator, [KINDS, FEATURES -
        KINDS]; minus infinity for a kind that is not in it.
      high: Maximum, or infinity.
      about: Description of the training.
    """

    values: Mapping[str, ArrayLike]
    shift: Array
    scale: Array
    hidden_shift: Array
    hidden_scale: Array
    mean: Array
    precision: Array
    low: Array
    high: Array
    about: str = ""

    def basis(self, table: Array) -> Basis:
        """Runs the network on operators.

        Args:
          table: Operators as ``operators.rows`` makes them, [operators, WIDTH].
        """
        count = len(table)
        x, beyond = self._inside(table)
        x = (x - self.shift) / self.scale
        # Padded to a few sizes, each of which is compiled once.
        padded = max(_LEAST_ROWS, 1 << max(count - 1, 0).bit_length())
        x = np.pad(x, ((0, padded - count), (0, 0))).astype(np.float32)
        heads, hidden = (np.asarray(one, np.float64) for one in _run(dict(self.values), x))
        hidden = (hidden - self.hidden_shift) / self.hidden_scale
        return Basis(heads[:, :count, 0] + beyond, heads[:, :count, 1:], hidden[:count])

    def _inside(self, table: Array) -> tuple[Array, Array]:
        """Returns features clipped to the range of the training set.

        The network does not extrapolate. An operator outside the range is treated as the largest
        one in the training set, multiplied by the ratio of operations or bytes.

        Args:
          table: Operators as ``operators.rows`` makes them, [operators, WIDTH].

        Returns:
          The features, [operators, FEATURES], and the logarithms of the factors by which times are
          multiplied, [operators].
        """
        kinds, seen = table[:, 0].astype(int), features(table)
        numbers = seen[:, len(KINDS) :]
        above = np.maximum(numbers[:, :SIZES] - self.high[kinds, :SIZES], 0.0).max(1)
        seen[:, len(KINDS) :] = np.clip(numbers, self.low[kinds], self.high[kinds])
        return seen, above * np.log(2.0)

    def save(self, path: Path) -> None:
        """Writes the network in float16, its prior in float32.

        Raises:
          DiskError: The file cannot be written.
        """
        arrays = {f"network/{name}": np.asarray(v, np.float16) for name, v in self.values.items()}
        for name in _PLAIN:
            arrays[name] = np.asarray(getattr(self, name), np.float32)
        remedy = "choose another file with --out"
        write_tensors(path, arrays, {"about": self.about}, remedy)


_PLAIN = ("shift", "scale", "hidden_shift", "hidden_scale", "mean", "precision", "low", "high")


def load(path: Path = SHIPPED) -> Weights:
    """Reads a trained network.

    Raises:
      DataError: The file cannot be read or is not such a network.
    """
    try:
        arrays = load_file(path)
        plain = {name: arrays.pop(name).astype(np.float64) for name in _PLAIN}
        values = {
            name.removeprefix("network/"): value.astype(np.float32)
            for name, value in arrays.items()
        }
        expected = {name: value.shape for name, value in flatten(fresh(0)).items()}
        found = {name: value.shape for name, value in values.items()}
        if found != expected:
            raise DataError(f"{path} contains another network: expected {expected}, got {found}")
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        about = header.get("__metadata__", {}).get("about", "")
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a latency predictor: {describe_reading(error)}") from error
    return Weights(values, about=about, **plain)


def fresh(seed: int) -> LatencyNetwork:
    """Returns an untrained network."""
    return LatencyNetwork(nnx.Rngs(seed))


def flatten(network: LatencyNetwork) -> Arrays:
    """Returns a network's parameters by path."""
    return {
        "/".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))
    }


def apply(values: Mapping[str, ArrayLike], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs a network given by its parameters; pure, for tracing. As ``LatencyNetwork.__call__``."""
    tree: dict[str, dict[str, ArrayLike]] = {}
    for path, value in values.items():
        layer, name = path.split("/")
        tree.setdefault(layer, {})[name] = value
    graph, _ = nnx.split(nnx.eval_shape(partial(fresh, 0)))
    made: tuple[jax.Array, jax.Array] = nnx.merge(graph, tree)(x)
    return made


_run = jax.jit(apply)
