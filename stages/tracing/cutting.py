"""Where a traced network can be cut, and why it cannot elsewhere.

A cut is a position at which a single floating array is live (apart from values that depend only on
side inputs, weights or constants), where no module has variables on both sides, and where there is
something to train on each side. Of several positions with the same variables before them, the cut
is that at which the fewest bytes cross.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stages.errors import StageError
from stages.model import Obstacle
from stages.tracing.flow import Flow
from stages.trees import Atom

#: Samples of the two traces that are compared to find the batch axis.
FEW, MORE = 2, 3


@dataclasses.dataclass(frozen=True)
class CutTensor:
    """The array that crosses a cut.

    In the network the axis that grows with the batch need not be the first, and may hold several
    rows of a sample. Outside of units the first axis is the batch.

    Attributes:
      shape: Its shape in the network for one sample, with the batch axis.
      axis: The axis that grows with the batch.
      dtype: Its dtype.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: DTypeLike

    def inside(self, samples: int) -> jax.ShapeDtypeStruct:
        """Returns the array for a number of samples as the network has it."""
        shape = list(self.shape)
        shape[self.axis] *= samples
        return jax.ShapeDtypeStruct(tuple(shape), self.dtype)  # type: ignore[no-untyped-call]

    def outside(self, samples: int) -> jax.ShapeDtypeStruct:
        """Returns the array for a number of samples as units return it: [samples, …]."""
        rows, rest = self.shape[self.axis], self._rest
        shape = (samples, *rest) if rows == 1 else (samples, rows, *rest)
        return jax.ShapeDtypeStruct(shape, self.dtype)  # type: ignore[no-untyped-call]

    def enter(self, x: jax.Array) -> jax.Array:
        """Converts an array from the units' layout to the network's."""
        rows = x.shape[0] * self.shape[self.axis]
        return jnp.moveaxis(x.reshape(rows, *self._rest), 0, self.axis).astype(self.dtype)

    def leave(self, x: jax.Array) -> jax.Array:
        """Converts an array from the network's layout to the units'."""
        samples = x.shape[self.axis] // self.shape[self.axis]
        return jnp.moveaxis(x, self.axis, 0).reshape(self.outside(samples).shape)

    @property
    def _rest(self) -> tuple[int, ...]:
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def nbytes(self) -> int:
        """Bytes per sample."""
        return int(np.prod(self.shape)) * int(jnp.dtype(self.dtype).itemsize)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A place where a network can be cut.

    Attributes:
      left: Paths of the variables that are used before it.
      right: Paths of the variables that are used behind it.
      boundary: The array that crosses it.
      position: Its position among the equations in training.
      length: Number of these equations; with as many, a trace for other samples has it there, too.
    """

    left: frozenset[str]
    right: frozenset[str]
    boundary: CutTensor
    position: int
    length: int


def find_cuts(
    few: Flow, more: Flow, params: Sequence[str]
) -> tuple[tuple[Cut, ...], tuple[Obstacle, ...]]:
    """Finds all cuts of a network, traced in training for ``FEW`` and for ``MORE`` samples.

    Args:
      few: The network called with ``FEW`` samples.
      more: The network called with ``MORE`` samples.
      params: Paths of the weights.

    Returns:
      The cuts in order, and the obstacles at other positions.
    """
    live, left, right = few.live_everywhere(), few.left(), few.right()
    grown = more.live_everywhere() if more.length == few.length else None
    weights = frozenset(params)
    best: dict[frozenset[str], tuple[Any, Cut]] = {}
    refused: dict[frozenset[str], tuple[int, str]] = {}
    order: list[frozenset[str]] = []
    for position in range(few.length + 1):
        here = left[position]
        if here not in order:
            order.append(here)
        reason, boundary = _look(
            few, live[position], grown[position] if grown else None,
            here, right[position], weights,
        )  # fmt: skip
        if boundary is None:
            rank = len(live[position])
            if here not in refused or rank < refused[here][0]:
                refused[here] = rank, reason
            continue
        cut = Cut(here, right[position], boundary, position, few.length)
        made = _rank(boundary, position), cut
        if here not in best or made[0] < best[here][0]:
            best[here] = made
    obstacles: list[Obstacle] = []
    kinds: list[str] = []
    for before, here in zip([frozenset[str](), *order], order, strict=False):
        new = here - before
        if here in best:
            kinds.append("")
        elif (
            here & weights
            and (weights & few.used) - here
            # Inside the module that has just begun a cut is not expected.
            and not _modules(new) & _modules(few.used - here)
        ):
            _, reason = refused[here]
            kind = reason.partition(":")[0]
            if kinds and kinds[-1] == kind:
                first = obstacles.pop()
                reason, new_place = (
                    first.reason,
                    f"{first.after.partition(' … ')[0]} … {_place(new)}",
                )
            else:
                new_place = _place(new)
            obstacles.append(Obstacle(new_place, reason))
            kinds.append(kind)
    return tuple(best[here][1] for here in order if here in best), tuple(obstacles)


def place(flow: Flow, cuts: Sequence[Cut], samples: int, name: str) -> list[int | None]:
    """Finds the cuts in another trace of the same network, by the variables on both sides.

    Args:
      flow: The network, traced for another number of samples, or for inference.
      cuts: The cuts.
      samples: Samples of the trace.
      name: The model's name, for messages.

    Returns:
      For each cut its position, None for a cut that does not exist in the trace.

    Raises:
      StageError: The output does not depend on the samples.
    """
    if not flow.is_of_samples:
        raise StageError(f"model {name!r}: its output does not depend on its input: nothing to cut")
    live, left, right = flow.live_everywhere(), flow.left(), flow.right()
    positions: list[int | None] = []
    for cut in cuts:
        wanted = cut.boundary.inside(samples)
        fits = [
            position
            for position in range(flow.length + 1)
            if len(live[position]) == 1
            and live[position][0].aval.shape == wanted.shape
            and live[position][0].aval.dtype == wanted.dtype
            and not left[position] & cut.right
            and not right[position] & cut.left
        ]
        # Shapes do not tell positions apart where there are as many samples as, say, time steps.
        known = flow.length == cut.length and cut.position in fits
        positions.append(cut.position if known else fits[-1] if fits else None)
    return positions


def _look(
    flow: Flow,
    live: Sequence[Atom],
    grown: Sequence[Atom] | None,
    left: frozenset[str],
    right: frozenset[str],
    weights: frozenset[str],
) -> tuple[str, CutTensor | None]:
    """Returns why a position is not a cut, or the array that crosses it."""
    source = next(iter(flow.flat.inputs.values()))
    if left & right:
        return f"{sorted(left & right)[0]} is used on both sides", None
    torn = sorted(_modules(left) & _modules(right))
    if torn:
        return f"module {torn[0]!r} has variables on both sides", None
    if not left & weights or not right & weights:
        return "there is nothing to train on one side", None
    if len(live) != 1:
        arrays = ", ".join(_text(var) for var in live)
        hint = ""
        if source in live:
            hint = "; one of them is the input: pass what is needed of it as a side input"
        elif not all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in live):
            hint = "; integers (masks, lengths) can be side inputs"
        return (
            f"{len(live)} arrays are needed behind it, and only 1 can cross: {arrays}{hint}",
            None,
        )
    (var,) = live
    if not jnp.issubdtype(var.aval.dtype, jnp.floating):
        return f"{_text(var)} crosses, which has no gradient", None
    boundary = _boundary(var.aval, grown[0].aval) if grown and len(grown) == 1 else None
    if boundary is None:
        return f"no axis of {_text(var)} grows with the number of samples", None
    return "", boundary


def _boundary(few: Atom, more: Atom) -> CutTensor | None:
    """Finds the batch axis by comparing an array of ``FEW`` and of ``MORE`` samples."""
    if len(few.shape) != len(more.shape) or few.dtype != more.dtype:
        return None
    pairs = list(zip(few.shape, more.shape, strict=True))
    differing = [axis for axis, (a, b) in enumerate(pairs) if a != b]
    if len(differing) != 1:
        return None
    (axis,) = differing
    a, b = pairs[axis]
    if a % FEW or a // FEW * MORE != b:
        return None
    shape = (*few.shape[:axis], a // FEW, *few.shape[axis + 1 :])
    return CutTensor(tuple(map(int, shape)), axis, few.dtype)


def _rank(boundary: CutTensor, position: int) -> tuple[int, bool, int]:
    """Returns the sort key of equivalent positions, those with the same variables before them."""
    plain = boundary.axis == 0 and boundary.shape[0] == 1
    return boundary.nbytes, not plain, -position


def _module(path: str) -> str:
    """Returns the module that holds a variable; a variable of the root stands for itself."""
    return os.path.dirname(path) or path


def _modules(paths: frozenset[str]) -> frozenset[str]:
    return frozenset(map(_module, paths))


def _place(new: frozenset[str]) -> str:
    """Returns the modules before a position, as text."""
    return " and ".join(sorted(_modules(new)))


def _text(var: Atom) -> str:
    return f"{var.aval.dtype}{list(var.aval.shape)}"
