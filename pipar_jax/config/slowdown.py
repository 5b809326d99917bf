"""Emulated slowdown of a host: a constant factor, and one that changes during a run."""

from __future__ import annotations

import time
from typing import NamedTuple

from pipar_jax.errors import ConfigError


class Slowdown(NamedTuple):
    """The factors by which compute times are multiplied.

    Attributes:
      factor: The constant factor.
      steps: (seconds since the first round began, additional factor), in increasing order from 0 s.
    """

    factor: float = 1.0
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether any factor differs from 1."""
        return self.factor != 1.0 or bool(self.steps)

    def at(self, elapsed_s: float) -> float:
        """Returns the product of the factors at a time since the start of the first round."""
        further = 1.0
        for at_s, value in self.steps:
            if elapsed_s < at_s:
                break
            further = value
        return self.factor * further

    def since(self, began_s: float | None) -> float:
        """Returns the product of the factors now, or at the start for None."""
        return self.at(0.0 if began_s is None else time.monotonic() - began_s)


#: No slowdown.
UNSLOWED = Slowdown()


def read_slowdown(factor: float, trace: str, field: str) -> Slowdown:
    """Returns how slow a host is configured to be.

    Args:
      factor: Throughout the run.
      trace: The file of further factors over time; empty for none.
      field: The name of the field that holds the file, for messages.

    Raises:
      ConfigError: The file cannot be used.
    """
    if not trace:
        return Slowdown(factor)
    from comms.emulation.timetable import read_timetable
    from comms.errors import ChannelError

    try:
        rows = read_timetable(trace, ("slowdown",))
    except ChannelError as error:
        raise ConfigError(f"{field}={trace!r}: {error}") from error
    for at_s, value in rows:
        if value < 1:
            raise ConfigError(
                f"{field}={trace!r}: a factor must be at least 1, got {value:g} at {at_s:g} s"
            )
    return Slowdown(factor, tuple((at_s, value) for at_s, value in rows))
