"""Measures the formulations of layers on this machine and writes ``stages/layers/measured.csv``.

Run ``taskset -c 0 python -m experiments.benchmarks.layer_formulations`` on a quiet machine; it
takes half an hour, most of it to compile. Times are processor times, minima of several runs in
which the formulations alternate, so that other work affects them little.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipar_jax.disk.files import check_target, replacing
from pipar_jax.launch import plain_flags
from stages.allocator import retain_memory
from stages.errors import StageError
from stages.layers.conv_functions import Geometry, convolve
from stages.layers.depthwise import depthwise
from stages.layers.formulation import TABLE, Formulation, LayerShape, Times, forced, recorded
from stages.layers.pool import max_pool
from stages.names import MODELS, STEMS
from stages.program import Program
from stages.registry import build

# Samples of the data sets that presets train on: CIFAR-10, MNIST, scikit-learn's digits.
SAMPLES = ((32, 32, 3), (28, 28, 1), (8, 8, 1))
BATCHES = (10, 25, 100)
# Each formulation is run for this total time, within these limits of runs.
TOTAL_MS = 100.0
RUNS = (4, 12)
# A formulation that is slower by this factor is not run for the full time.
HOPELESS = 3.0
HOPELESS_MS = 20.0


class Case(NamedTuple):
    """One operation with its formulations as functions.

    Attributes:
      operation: Its name, as for ``formulation.choose``.
      shape: Its shape.
      functions: The operation by formulation.
      arguments: What the functions are called with.
    """

    operation: str
    shape: LayerShape
    functions: dict[str, Callable[..., Any]]
    arguments: tuple[jax.Array, ...]


def registered_shapes(
    batch: int, samples: Sequence[tuple[int, ...]] = SAMPLES, stems: Sequence[str] = STEMS
) -> list[tuple[str, LayerShape]]:
    """Lists the layers that have formulations in all registered networks.

    Networks are traced, nothing is computed.

    Args:
      batch: Samples in the batch of the shapes that are returned.
      samples: Shapes of one sample.
      stems: Stems of those networks that have a choice.

    Returns:
      Pairs of "conv", "depthwise" or "max_pool" and the shape, each once, in order.
    """
    found: set[tuple[str, LayerShape]] = set()
    for name in MODELS:
        for sample in samples:
            for stem in stems:
                # The table may not exist yet.
                with forced(Formulation.XLA), recorded() as asked:
                    try:
                        build(name, input_shape=sample, classes=10, stem=stem)
                    except StageError:  # a network of tokens does not accept images
                        continue
                found |= asked
                if not asked:
                    break  # nor does it have another stem
    layers = {(operation.removesuffix("_forward"), shape) for operation, shape in found}
    return sorted((operation, shape._replace(batch=batch)) for operation, shape in layers)


def cases(layer: str, shape: LayerShape) -> Iterator[Case]:
    """Yields the timed cases of a layer: the passes of a convolution, both passes of others."""
    geometry = Geometry(shape.size, shape.stride, shape.padding)
    x = _normal(*shape[:4])
    if layer == "conv":
        kernel = _normal(shape.size, shape.size, shape.features, shape.out)
        cotangent = _normal(
            shape.batch, geometry.out(shape.height), geometry.out(shape.width), shape.out
        )
        yield from _convolution(shape, geometry, (x, kernel, cotangent))
    elif layer == "depthwise":
        kernel = _normal(shape.size, shape.size, 1, shape.features)
        run = _both_passes(lambda x, kernel: depthwise(x, kernel, geometry))
        yield Case(layer, shape, alternatives(run, Formulation.DIRECT), (x, kernel))
    else:
        run = _both_passes(
            lambda x: max_pool(x, shape.size, stride=shape.stride, padding=shape.padding)
        )
        yield Case(layer, shape, alternatives(run, Formulation.DIRECT), (x,))


def _convolution(
    shape: LayerShape, geometry: Geometry, arguments: tuple[jax.Array, ...]
) -> Iterator[Case]:
    def pull(which: int) -> Callable[..., jax.Array]:
        def run(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
            _, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, geometry), x, kernel)
            gradient: jax.Array = pullback(cotangent)[which]
            return gradient

        return run

    passes = {
        "conv_forward": lambda x, kernel, cotangent: convolve(x, kernel, geometry),
        "conv_input": pull(0),
        "conv_kernel": pull(1),
    }
    for operation, run in passes.items():
        yield Case(operation, shape, alternatives(run, Formulation.PATCHES), arguments)


def _both_passes(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(*arguments: jax.Array) -> Any:
        y, pullback = jax.vjp(function, *arguments)
        return pullback(y)

    return run


def alternatives(function: Callable[..., Any], own: Formulation) -> dict[str, Callable[..., Any]]:
    """Returns the function as XLA's operation and in our formulation."""

    def force(formulation: Formulation) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with forced(formulation):
                return function(*arguments)

        return run

    return {formulation.value: force(formulation) for formulation in (Formulation.XLA, own)}


def time_ms(functions: dict[str, Callable[..., Any]], *arguments: jax.Array) -> Times:
    """Times functions alternately; returns the minimum processor time of each in milliseconds."""
    programs = {name: Program(function) for name, function in functions.items()}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))  # type: ignore[no-untyped-call]
    least = {name: float("inf") for name in programs}
    total = dict.fromkeys(programs, 0.0)
    for run in range(RUNS[1]):
        for name, program in programs.items():
            if total[name] > HOPELESS_MS and least[name] > HOPELESS * min(least.values()):
                continue
            if run >= RUNS[0] and total[name] > TOTAL_MS:
                continue
            began = time.process_time()
            jax.block_until_ready(program(*arguments))  # type: ignore[no-untyped-call]
            took = 1e3 * (time.process_time() - began)
            least[name], total[name] = min(least[name], took), total[name] + took
    return least


def measure(layers: Iterable[tuple[str, LayerShape]]) -> Iterator[tuple[str, LayerShape, Times]]:
    """Times every pass of layers; yields operation, shape and times, and prints them."""
    for layer, shape in layers:
        for case in cases(layer, shape):
            times = time_ms(case.functions, *case.arguments)
            print(case.operation, *shape, {k: round(v, 3) for k, v in times.items()}, flush=True)
            yield case.operation, shape, times


def write(rows: Iterable[tuple[str, LayerShape, Times]], path: Path) -> None:
    """Writes the table: a row for each operation and shape, milliseconds on one core."""
    names = [formulation.value for formulation in Formulation]
    with (
        replacing(path, "choose another file with --out") as aside,
        aside.open("w", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["operation", *LayerShape._fields, *names])
        for operation, shape, times in sorted(rows, key=lambda row: row[:2]):
            found = [f"{times[name]:.3g}" if name in times else "" for name in names]
            table.writerow([operation, *shape, *found])


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def renew(path: Path) -> None:
    """Measures all layers and writes the table.

    Raises:
      ConfigError: The file cannot be written.
      DiskError: Writing the file failed.
    """
    check_target(path, f"--out={path}")
    retain_memory()
    wanted = [layer for batch in BATCHES for layer in registered_shapes(batch)]
    write(list(measure(wanted)), path)


if __name__ == "__main__":
    out = plain_flags.define_path("out", str(TABLE), "File for the table (CSV).")
    plain_flags.run(lambda _: renew(out.value))
