"""Names for trees of arrays and for what jax makes of a function."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from flax import nnx

PyTree: TypeAlias = Any
"""A tree of arrays, of their shapes or of tracers, of any structure: jax has no type for it."""
Arrays: TypeAlias = dict[str, jax.Array]
"""Arrays by name: parameters or other variables of one unit."""
Variables: TypeAlias = dict[str, Arrays]
"""Variables of a model or a stage: by unit, then by name."""
Targets: TypeAlias = jax.Array | Arrays
"""What a loss compares outputs with: an array [samples, …] of any dtype, or a dict of them."""
OptState: TypeAlias = dict[str, PyTree]
"""Optimiser state by unit."""
Path: TypeAlias = tuple[Any, ...]
"""Where a variable is in a module: attributes, keys and indices."""
Leaf: TypeAlias = nnx.Variable[Any]
"""A variable of a module."""
Jaxpr: TypeAlias = Any
"""A traced function, closed or not; its classes differ between the supported versions of jax."""
Atom: TypeAlias = Any
"""A variable or a literal of a ``Jaxpr``."""
Equation: TypeAlias = Any
"""One of the equations of a ``Jaxpr``."""
