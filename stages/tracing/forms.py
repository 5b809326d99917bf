"""A traced network's inputs and cuts for samples of one length, and of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from stages.errors import StageError
from stages.tracing.cutting import FEW, Cut, CutTensor, place
from stages.tracing.flat import flatten
from stages.tracing.flow import Flow
from stages.tracing.networks import Network


@dataclasses.dataclass(frozen=True, eq=False)
class TracedForm:
    """A network's inputs and cuts for samples of a length.

    Attributes:
      inputs: For each input its abstract sample; the first is the input that is cut.
      cuts: The cuts.
      boundaries: The input, and what crosses each cut.
    """

    inputs: Mapping[str, jax.ShapeDtypeStruct]
    cuts: tuple[Cut, ...]
    boundaries: tuple[CutTensor, ...]

    @classmethod
    def of(cls, inputs: Mapping[str, jax.ShapeDtypeStruct], cuts: Sequence[Cut]) -> TracedForm:
        """Returns the form of inputs and cuts."""
        main, *_ = inputs.values()
        first = CutTensor((1, *main.shape), 0, main.dtype)
        return cls(dict(inputs), tuple(cuts), (first, *(cut.boundary for cut in cuts)))


def reshaped(network: Network, base: TracedForm, longest: int, length: int) -> TracedForm:
    """Returns a network's inputs and cuts for samples of another length.

    Args:
      network: The network.
      base: What they are for the length that it was traced with.
      longest: That length.
      length: The other one.

    Raises:
      StageError: The network has another structure, or other arrays cross.
    """
    inputs = {
        name: jax.ShapeDtypeStruct((length, *one.shape[1:]), one.dtype)  # type: ignore
        if one.shape[:1] == (longest,)
        else one
        for name, one in base.inputs.items()
    }
    flows = [Flow(flatten(network, batched(some, FEW), True)) for some in (base.inputs, inputs)]
    positions = place(flows[0], base.cuts, FEW, network.name)
    cuts = []
    for cut, position in zip(base.cuts, positions, strict=True):
        rows = cut.boundary.shape[cut.boundary.axis] * FEW
        alike = flows[0].length == flows[1].length
        live = flows[1].live(position) if alike and position is not None else []
        if len(live) != 1 or live[0].aval.shape[cut.boundary.axis : cut.boundary.axis + 1] != (
            rows,
        ):
            raise StageError(
                f"model {network.name!r}: with sequences of {length} it cannot be cut behind "
                f"{sorted(cut.left)[-1]}, although it can with {longest}: let it compute the same "
                "for every length"
            )
        shape = list(map(int, live[0].aval.shape))
        shape[cut.boundary.axis] //= FEW
        boundary = dataclasses.replace(cut.boundary, shape=tuple(shape))
        cuts.append(dataclasses.replace(cut, boundary=boundary))
    return TracedForm.of(inputs, cuts)


def batched(
    inputs: Mapping[str, jax.ShapeDtypeStruct], samples: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns abstract batches of abstract samples."""
    return {
        name: jax.ShapeDtypeStruct((samples, *array.shape), array.dtype)  # type: ignore
        for name, array in inputs.items()
    }
