"""How slow an emulated host is: a factor, and another one that changes over a run."""

from __future__ import annotations

import time
from typing import NamedTuple

from comms.emulation.timetable import read_timetable
from comms.errors import ChannelError
from pipar_jax.config.fields import DeviceConfig, NodeConfig, ServerConfig
from pipar_jax.errors import ConfigError


class Slowdown(NamedTuple):
    """How many times longer computations last.

    Attributes:
      factor: Throughout.
      steps: (seconds since the first round began, further factor), in rising order from 0 s.
    """

    factor: float = 1.0
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether computations are stretched at all."""
        return self.factor != 1.0 or bool(self.steps)

    def at(self, elapsed_s: float) -> float:
        """Returns the whole factor at a time since the first round began."""
        further = 1.0
        for at_s, value in self.steps:
            if elapsed_s < at_s:
                break
            further = value
        return self.factor * further

    def since(self, began_s: float | None) -> float:
        """Returns the whole factor now, if the first round began then; None: it has not."""
        return self.at(0.0 if began_s is None else time.monotonic() - began_s)


#: The slowness of a host that is as fast as it is.
UNSLOWED = Slowdown()


def slowness(device: DeviceConfig, field: str = "slowdown_trace") -> Slowdown:
    """Returns a device's slowness as configured.

    Args:
      device: The device's complete configuration.
      field: The name of the field that holds the file, for the message.

    Raises:
      ConfigError: The file of factors over time cannot be used.
    """
    if not device.slowdown_trace:
        return Slowdown(device.slowdown)
    try:
        rows = read_timetable(device.slowdown_trace, ("slowdown",))
    except ChannelError as error:
        raise ConfigError(f"{field}={device.slowdown_trace!r}: {error}") from error
    for at_s, value in rows:
        if value < 1:
            raise ConfigError(
                f"{field}={device.slowdown_trace!r}: a factor must be at least 1, got {value:g} at "
                f"{at_s:g} s"
            )
    return Slowdown(device.slowdown, tuple((at_s, value) for at_s, value in rows))


def slowdown_of(host: DeviceConfig | NodeConfig | ServerConfig) -> Slowdown:
    """Returns the slowness of any host as configured.

    Raises:
      ConfigError: The file of factors over time cannot be used.
    """
    return slowness(host) if isinstance(host, DeviceConfig) else Slowdown(host.slowdown)
