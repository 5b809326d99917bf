"""Reports of non-finite numbers: on a host, as an event, and as the message that ends a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

from pipar_jax.aggregation import aggregator
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol.messages import NonFinite
from pipar_jax.schedule.actions import ALL, Span
from pipar_jax.training.replica import Replica

_MOST_UNITS = 3


def line(found: NonFinite) -> str:
    """Returns the message that ends a run."""
    whose = "all devices" if found.device is None else f"device {found.device}"
    what = "the loss is"
    if found.units:
        more = len(found.units) - _MOST_UNITS
        names = ", ".join(found.units[:_MOST_UNITS]) + (f" and {more} more" if more > 0 else "")
        what = f"after it the {found.what} of {names} {'is' if found.what == 'average' else 'are'}"
    return (
        f"{whose}, round {found.round}, step {found.step}: {what} not finite; lower "
        "optimizer.learning_rate or set optimizer.clip_norm (run.nonfinite=ignore goes on). No "
        "weights were saved"
    )


def event(found: NonFinite) -> JsonObject:
    """Returns the event; its device is None for what all devices share."""
    return {"event": "nonfinite", **dataclasses.asdict(found), "units": list(found.units)}


def broken_units(
    replicas: Mapping[tuple[int, int], Replica], without: Collection[int]
) -> dict[int, tuple[str, ...]]:
    """Returns for each place, or ``ALL``, the units of a host that are not finite.

    Args:
      replicas: The host's replicas.
      without: Places that are left out.
    """
    broken: dict[int, tuple[str, ...]] = {}
    for (place, _), replica in replicas.items():
        if place in without:
            continue
        units = aggregator.broken_units(
            replica.params, replica.params, replica.state, replica.opt_state
        )
        if units:
            broken[place] = broken.get(place, ()) + units
    return broken


def weight_reports(
    broken: Mapping[int, tuple[str, ...]], spans: Iterable[Span], index: int, *, averaged: bool
) -> Iterator[NonFinite]:
    """Yields a host's reports of non-finite weights after a round.

    Args:
      broken: For each place, or ``ALL``, the units that are not finite.
      spans: The steps of the round.
      index: The round's number.
      averaged: Whether all copies are the average now.
    """
    ends = {span.device: span.stop - 1 for span in spans}
    last = max(ends.values())
    if averaged and broken:
        yield NonFinite("average", None, index, last, next(iter(broken.values())))
        return
    for place, units in broken.items():
        whose = None if place == ALL else place
        yield NonFinite("weights", whose, index, ends.get(place, last), units)
