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
# This module may be loaded while a function is traced (names of the package are, on first use); a
# new thread is never inside one.
with ThreadPoolExecutor(1) as _pool:
    _OUTSIDE: Any = _pool.submit(get_opaque_trace_state).result()


@functools.cache
def compiler_options() -> dict[str, str]:
    """Returns XLA's compiler options for stages on the default platform.

    Empty if the platform is not a CPU, if this XLA does not have the option, or if the user has set
    it in ``XLA_FLAGS``.
    """
    if jax.default_backend() != "cpu" or LIBRARY in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {LIBRARY: ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in _KINDS)}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


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
