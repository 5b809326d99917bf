"""Measures the formulations of layers on this machine and writes `stages/layers/measured.py`.

Run `taskset -c 0 python -m stages.layers.measure` on a quiet machine; it takes some minutes.
Times are processor time, least of several runs in which the formulations alternate, so other
work on the machine disturbs them little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.allocator import retain_memory
from stages.layers.choice import Formulation, forced
from stages.layers.convolve import Geometry, convolve
from stages.layers.depthwise import depthwise
from stages.layers.pool import max_pool
from stages.program import Program

# (height, in, out, size, stride) of the convolutions of the registered networks, thinned out.
CONVOLUTIONS = (
    (32, 3, 32, 3, 1), (32, 3, 64, 3, 1), (32, 64, 64, 3, 1), (16, 32, 64, 3, 1),
    (16, 128, 128, 3, 1), (8, 64, 64, 3, 1), (8, 256, 256, 3, 1), (4, 512, 512, 3, 1),
    (2, 512, 512, 3, 1), (1, 512, 512, 3, 1), (32, 64, 128, 3, 2), (16, 128, 256, 3, 2),
    (8, 256, 512, 3, 2), (4, 512, 512, 3, 2), (2, 256, 256, 3, 1), (32, 3, 64, 7, 2),
    (32, 3, 16, 3, 2), (32, 64, 64, 1, 1), (32, 64, 256, 1, 1), (32, 256, 64, 1, 1),
    (16, 16, 72, 1, 1), (16, 88, 24, 1, 1), (16, 512, 128, 1, 1), (8, 256, 1024, 1, 1),
    (8, 240, 40, 1, 1), (4, 2048, 512, 1, 1), (4, 96, 576, 1, 1), (2, 576, 96, 1, 1),
    (1, 960, 160, 1, 1), (32, 64, 128, 1, 2), (16, 512, 1024, 1, 2), (8, 256, 512, 1, 2),
)  # fmt: skip
BATCHES = (5, 25)
DEPTHWISE = ((16, 72, 3, 2), (16, 384, 3, 1), (8, 96, 5, 2), (8, 240, 5, 1), (2, 576, 5, 1))
POOLS = ((32, 32, 2, 2), (16, 64, 2, 2), (4, 512, 2, 2), (16, 64, 3, 2))
HEADER = '''"""Times of formulations on a CPU; written by `python -m stages.layers.measure`.

For each operation: (batch, height, width, in, out, size, stride) and milliseconds of processor
time on one core.
"""

from __future__ import annotations

Row = tuple[tuple[int, int, int, int, int, int, int], dict[str, float]]

'''


def time_ms(functions: dict[str, Callable[..., Any]], *arguments: jax.Array) -> dict[str, float]:
    """Times functions in turn; returns the least processor time of each in milliseconds."""
    compiled = {name: Program(function) for name, function in functions.items()}
    least: dict[str, float] = {}
    for name, function in compiled.items():
        jax.block_until_ready(function(*arguments))  # type: ignore[no-untyped-call]
        least[name] = float("inf")
    for _ in range(6):
        for name, function in compiled.items():
            began = time.process_time()
            jax.block_until_ready(function(*arguments))  # type: ignore[no-untyped-call]
            least[name] = min(least[name], 1e3 * (time.process_time() - began))
    return {name: round(value, 3) for name, value in least.items()}


def alternatives(
    function: Callable[..., Any], *formulations: Formulation
) -> dict[str, Callable[..., Any]]:
    """Returns the function once for each formulation, forced."""

    def force(formulation: Formulation) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with forced(formulation):
                return function(*arguments)

        return run

    return {formulation.value: force(formulation) for formulation in formulations}


def measure_convolution(batch: int, row: tuple[int, ...]) -> dict[str, Any]:
    """Times the three passes of one convolution."""
    height, features, out, size, stride = row
    geometry = Geometry(size, stride, size // 2)
    x, kernel = _normal(batch, height, height, features), _normal(size, size, features, out)
    cotangent = _normal(batch, geometry.out(height), geometry.out(height), out)

    def pull(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, which: int) -> jax.Array:
        _, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, geometry), x, kernel)
        gradient: jax.Array = pullback(cotangent)[which]
        return gradient

    both = (Formulation.XLA, Formulation.PATCHES)
    passes = {
        "conv_forward": lambda x, k, c: convolve(x, k, geometry),
        "conv_input": lambda x, k, c: pull(x, k, c, 0),
        "conv_kernel": lambda x, k, c: pull(x, k, c, 1),
    }
    return {
        name: time_ms(alternatives(function, *both), x, kernel, cotangent)
        for name, function in passes.items()
    }


def measure_pass(
    function: Callable[..., jax.Array], formulations: tuple[Formulation, ...], *arguments: Any
) -> dict[str, float]:
    """Times forward and backward pass of a function of images together."""

    def run(*arguments: Any) -> Any:
        y, pullback = jax.vjp(function, *arguments)
        return pullback(y)

    return time_ms(alternatives(run, *formulations), *arguments)


def measure_all() -> dict[str, list[Any]]:
    """Times every operation at every shape and prints a line for each."""
    rows: dict[str, list[Any]] = {}

    def note(operation: str, shape: tuple[int, ...], times: dict[str, float]) -> None:
        rows.setdefault(operation, []).append((shape, times))
        print(operation, shape, times, flush=True)

    for batch in BATCHES:
        for row in CONVOLUTIONS:
            shape = (batch, row[0], row[0], *row[1:])
            for operation, times in measure_convolution(batch, row).items():
                note(operation, shape, times)
    batch = BATCHES[-1]
    either = (Formulation.XLA, Formulation.DIRECT)
    for height, features, size, stride in DEPTHWISE:
        geometry = Geometry(size, stride, size // 2)
        times = measure_pass(
            lambda x, kernel, geometry=geometry: depthwise(x, kernel, geometry),
            either,
            _normal(batch, height, height, features),
            _normal(size, size, 1, features),
        )
        note("depthwise", (batch, height, height, features, features, size, stride), times)
    for height, features, window, stride in POOLS:
        times = measure_pass(
            lambda x, window=window, stride=stride: max_pool(
                x, window, stride=stride, padding=window // 3
            ),
            either,
            _normal(batch, height, height, features),
        )
        note("max_pool", (batch, height, height, features, features, window, stride), times)
    return rows


def write(rows: dict[str, list[Any]], path: Path) -> None:
    """Writes the table as a Python module."""
    lines = [HEADER, "TABLE: dict[str, tuple[Row, ...]] = {\n"]
    for operation, measured in rows.items():
        lines.append(f'    "{operation}": (\n')
        for shape, times in measured:
            inside = ", ".join(f'"{name}": {value}' for name, value in times.items())
            lines.append(f"        ({shape}, {{{inside}}}),\n")
        lines.append("    ),\n")
    lines.append("}\n")
    path.write_text("".join(lines))


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


if __name__ == "__main__":
    retain_memory()
    write(measure_all(), Path(__file__).with_name("measured.py"))
