"""Jitted functions, compiled with options that make XLA fast on the current platform."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

# XLA on CPUs hands work to a library (YNNPACK), by kinds. Its matrix products and reductions are
# fast, its convolutions not: with few output channels they use one core, and the gradients of
# kernels over large images take more than twice as long as XLA's own.
LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_KINDS = ("DOT", "INDIVIDUAL_DOT", "REDUCE")
# XLA orders what a program computes so that several cores find work at the same time, and hands
# it out in small tasks. Where there is one core the tasks cost up to a sixth of a stage of many
# small layers, and nothing is gained.
CONCURRENT = "xla_cpu_enable_concurrency_optimized_scheduler"
# This module may be loaded while a function is traced (names of the package are, on first use); a
# new thread is never inside one.
with ThreadPoolExecutor(1) as _pool:
    _OUTSIDE: Any = _pool.submit(get_opaque_trace_state).result()


@functools.cache
def compiler_options() -> dict[str, str]:
    """Returns XLA's compiler options for stages on the default platform.

    Empty if the platform is not a CPU; without the options that this XLA does not have, or that the
    user has set in ``XLA_FLAGS``.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {LIBRARY: ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in _KINDS)}
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
        options[CONCURRENT] = "False"
    set_by_user = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in options.items()
        if name not in set_by_user and _is_known(name, value)
    }


def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Program:
    """A function under ``jax.jit``, with ``compiler_options``.

    If it is called while another function is traced, it becomes part of that function: jax applies
    compiler options only at the top level.
    """

    def __init__(self, function: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()):
        self._function = function
        self._donated = donate_argnums
        self._part = jax.jit(function, donate_argnums=donate_argnums)

    @functools.cached_property
    def _whole(self) -> Any:
        """The jitted function, created on first use: querying the platform starts jax's backend."""
        options = compiler_options()
        return jax.jit(
            self._function, donate_argnums=self._donated, compiler_options=options or None
        )

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function, or inlines it into a function that is traced."""
        inside: Any = get_opaque_trace_state()  # type: ignore[no-untyped-call]
        return (self._whole if inside == _OUTSIDE else self._part)(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """Lowers the function for (abstract) arguments, as ``jax.stages.Lowered``."""
        return self._whole.lower(*arguments)
