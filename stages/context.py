"""The context of layers while a stage is traced.

A unit is an ordinary NNX module called with one argument. Further inputs of its layers (training or
inference, the share of the mini-batch, the seed of dropout) would otherwise have to pass through
every user's ``__call__``; they are kept here during a trace.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from stages.errors import StageError
from stages.micro_batch_context import MicroBatchContext, name_hash


@dataclasses.dataclass
class Context:
    """The context of the call that is traced.

    Attributes:
      train: Whether batch statistics are taken from the batch and dropout is active.
      unit: Name of the unit being traced.
      samples: Samples in this micro-batch.
      draw: Scalars of the micro-batch (traced), None at inference.
      calls: Number of random layers called so far in this unit.
    """

    train: bool
    unit: str
    samples: int
    draw: MicroBatchContext | None = None
    calls: int = 0

    @property
    def share(self) -> Any:
        """Samples of this micro-batch over samples of the mini-batch, a traced scalar."""
        if self.draw is None:
            raise StageError(f"unit {self.unit!r}: the share of a batch is known in training only")
        return self.samples * self.draw.inverse_batch

    def key(self) -> jax.Array:
        """Returns the random key of this unit for a device and step."""
        given = (0, 0, 0) if self.draw is None else self.draw[1:4]
        key = jax.random.key(given[0])
        for value in (*given[1:], name_hash(self.unit)):
            key = jax.random.fold_in(key, jnp.uint32(value))
        return key


_current: contextvars.ContextVar[Context | None] = contextvars.ContextVar("stages", default=None)


def current() -> Context:
    """Returns the context of the current trace; inference if there is none."""
    return _current.get() or Context(train=False, unit="", samples=0)


@contextlib.contextmanager
def entered(context: Context) -> Iterator[Context]:
    """Makes ``context`` the current one inside a with statement."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
