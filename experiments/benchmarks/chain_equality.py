"""The difference of training over chains of compute nodes from centralised SGD.

With averaging every step, weighted by samples, and group normalisation, both are equal up to
rounding. ``experiments.bench_multihop`` prints the largest difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipar_jax.config import Config
from pipar_jax.launch.pinning import run_pinned
from pipar_jax.methods.resolution import resolve
from stages.signature import Signature

SHAPE, CLASSES, BATCH, STEPS, DEVICES = (8, 8, 1), 10, 6, 3, 2


class Case(NamedTuple):
    """One chain.

    Attributes:
      nodes: Number of compute nodes.
      labels: ``home`` for a U-shape, ``end`` for a chain whose last node has the labels.
      weights: ``copy`` or ``shared``.
      in_flight: With shared weights the micro-batches in flight, 0 for any number.
    """

    nodes: int
    labels: str
    weights: str
    in_flight: int = 0


#: VGG-5 has five units, so a U-shape of it has at most three nodes.
CASES = (
    Case(1, "home", "copy"), Case(1, "home", "shared", 1), Case(2, "home", "shared"),
    Case(3, "home", "copy"), Case(3, "home", "shared", 2), Case(1, "end", "shared"),
    Case(2, "end", "copy"), Case(3, "end", "shared", 3), Case(4, "end", "copy"),
    Case(4, "end", "shared"),
)  # fmt: skip


def largest_difference(cases: Sequence[Case], folder: Path) -> float:
    """Returns the largest difference of any weight, relative to the largest of its array.

    Runs in float64, a setting of the whole process, and therefore in its own process.

    Args:
      cases: The chains.
      folder: Folder of runs.

    Raises:
      RunError: A run failed.
    """
    values = [tuple(case) for case in cases]
    return run_pinned(_largest, values, str(folder), variables={"JAX_PLATFORMS": "cpu"})


def _largest(cases: list[tuple[Any, ...]], folder: str) -> float:
    """Runs in its own process."""
    from pipar_jax.runtime.setup import build_model, set_up_jax

    config = _config(Case(*cases[0]), folder)
    set_up_jax(config.model)
    model = build_model(config, Signature.labelled(SHAPE, CLASSES))
    data = [_dataset(index) for index in range(DEVICES + 1)]
    expected = _centralised(config, model, data)
    return max(_difference(_config(Case(*case), folder), model, data, expected) for case in cases)


def _config(case: Case, folder: str) -> Config:
    """Returns a chain's configuration."""
    config = Config(name="chain", method="mpsl", epochs=1)
    config.model.name, config.model.norm, config.model.dtype = "vgg5", "group", "float64"
    config.data.batch_size, config.devices.count, config.nodes.count = BATCH, DEVICES, case.nodes
    config.pipeline.labels, config.pipeline.weights = case.labels, case.weights
    config.pipeline.in_flight, config.pipeline.micro_batches = case.in_flight, 2
    count = case.nodes + (case.labels == "home")
    config.pipeline.cuts = ",".join(str(i + 1) for i in range(count))
    config.optimizer.momentum, config.aggregation.every = 0.9, "1 steps"
    config.run.dir, config.run.evaluate_every = folder, 0
    return resolve(config)


def _dataset(seed: int) -> Any:
    """Returns random images and labels, which suffice for equality."""
    import numpy as np

    from pipar_jax.data import Dataset, Examples

    rng = np.random.default_rng(seed)
    images = rng.normal(size=(BATCH * STEPS, *SHAPE)).astype(np.float32)
    split = Examples.of(images, rng.integers(0, CLASSES, BATCH * STEPS).astype(np.int32))
    return Dataset("random", split, split, CLASSES)


def _centralised(config: Config, model: Any, data: Sequence[Any]) -> Any:
    """Returns the result of plain optax on the union, without stages, cuts or hosts."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import stages
    from pipar_jax.data.loader import Loader

    loaders = [
        Loader(one.train, None, BATCH, seed=config.seed, device=i)
        for i, one in enumerate(data[:-1])
    ]
    params, state = model.init(config.seed)
    tx = optax.sgd(config.optimizer.learning_rate, config.optimizer.momentum)
    opt_state = tx.init(params)

    def loss(params: Any, x: Any, labels: Any) -> Any:
        logits = stages.predict(model, params, state, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss))
    for step in range(STEPS):
        batches = [loader.batch(step) for loader in loaders]
        x = jnp.asarray(np.concatenate([batch.x for batch in batches]).astype(np.float64))
        labels = jnp.asarray(np.concatenate([batch.targets["y"] for batch in batches]))
        updates, opt_state = tx.update(gradient(params, x, labels), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def _difference(config: Config, model: Any, data: Sequence[Any], expected: Any) -> float:
    """Returns the largest difference of a run from the expected weights."""
    import numpy as np

    from pipar_jax.launch.api import run_here
    from pipar_jax.launch.finished_run import load

    run = load(run_here(config, model, data, on_event=lambda event: None), model)
    return max(
        float(np.abs(np.asarray(run.params[unit][path]) - wanted).max() / np.abs(wanted).max())
        for unit, arrays in expected.items()
        for path, array in arrays.items()
        for wanted in [np.asarray(array)]
    )
