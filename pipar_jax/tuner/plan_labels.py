"""What a plan between devices and server is called: its method, cuts and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipar_jax.methods.registry import METHODS
from pipar_jax.schedule.plan import Order, Plan


def labels(plan: Plan) -> Mapping[str, str]:
    """Returns the label of a plan: its method, cuts and micro-batches."""
    cuts = [chain.cuts[0] if chain.cuts else 0 for chain in plan.devices]
    numbers = [chain.micro_batches for chain in plan.devices]
    names = [_method_of(plan.order, cuts=any(cuts), micro_batches=max(numbers))]
    if any(cuts) and not all(cuts):  # some devices train the whole model
        names.append(_method_of(plan.order, cuts=False, micro_batches=1))
    return {"method": " + ".join(names), "cut": _range(cuts), "N": _range(numbers)}


def _method_of(order: Order, *, cuts: bool, micro_batches: int) -> str:
    """Returns the name of the two-host method with such plans."""
    return next(
        (
            name
            for name, method in METHODS.items()
            if method.makes(order=order, cuts=cuts, micro_batches=micro_batches)
        ),
        order,
    )


def _range(values: Sequence[int]) -> str:
    lowest, highest = min(values), max(values)
    text = "-" if not highest else str(lowest)
    return text if lowest == highest else f"{lowest}…{highest}"
