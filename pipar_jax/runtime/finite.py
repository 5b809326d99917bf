"""Reports of non-finite numbers: the event, and the message that ends a run."""

from __future__ import annotations

import dataclasses

from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol.messages import NonFinite

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
