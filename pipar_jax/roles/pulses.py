"""Pulses to members, and what their links carry: whether they make progress."""

from __future__ import annotations

import time
from collections.abc import Mapping

from comms import Link
from pipar_jax.config import NetworkConfig
from pipar_jax.protocol import messages, registry
from pipar_jax.roles.mail import Member, try_send
from pipar_jax.roles.patience import Moving, Patience, pulse_s
from pipar_jax.schedule.plan import COORDINATOR


class _Clock:
    """Says when it is time for the next pulse."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last_s = every_s, time.monotonic()

    def is_due(self) -> bool:
        """Returns whether it is time, which is then over."""
        now = time.monotonic()
        if now - self._last_s < self._every_s:
            return False
        self._last_s = now
        return True


class Pulses:
    """Periodically tells members that this process works, and looks which of them do.

    Args:
      network: How often.
      patience: The progress deadline.
    """

    def __init__(self, network: NetworkConfig, patience: Patience) -> None:
        self._clock, self._patience = _Clock(pulse_s(network)), patience
        self._count = 0
        self._moving: dict[str, Moving] = {}

    def are_due(self) -> bool:
        """Returns whether it is time for pulses, which is then over."""
        return self._clock.is_due()

    def send(self, members: Mapping[str, Member], actions: int) -> None:
        """Sends members a pulse, and records which of them make progress.

        Args:
          members: The present members by name.
          actions: Number of completed actions on the host in this process.
        """
        self._count += 1
        self._patience.pulse(COORDINATOR, actions)
        for name, member in list(members.items()):
            try_send(member.link, messages.Pulse(self._count))
            if name not in self._moving:
                self._moving[name] = Moving(member.link)
            elif self._moving[name].look():
                self._patience.transfer(name)

    def forget(self, name: str) -> None:
        """Forgets a member that is lost."""
        self._moving.pop(name, None)
        self._patience.forget(name)


class OwnPulse:
    """Periodically tells the coordinator how many actions are over on a device or node.

    Args:
      network: How often.
      patience: The progress deadline.
    """

    def __init__(self, network: NetworkConfig, patience: Patience) -> None:
        self._clock, self._patience = _Clock(pulse_s(network)), patience
        self._actions = 0
        self._moving: Moving | None = None

    def connected(self, link: Link) -> None:
        """Begins to look what the coordinator's link carries."""
        self._moving = Moving(link)

    def beat(self, link: Link, actions: int) -> None:
        """Sends a pulse if it is time for one, and more actions are over than at the last one."""
        if not self._clock.is_due():
            return
        if actions != self._actions:
            self._actions = actions
            registry.send(link, messages.Pulse(actions))
        if self._moving is not None and self._moving.look():
            self._patience.transfer(COORDINATOR)
