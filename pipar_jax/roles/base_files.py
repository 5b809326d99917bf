"""Whether every host has read the same weights from its own file (``model.base``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pipar_jax.config import Config
from pipar_jax.methods.registry import hosts_of
from pipar_jax.schedule.plan import Plan, device_name, is_device, long_name
from pipar_jax.training.base_weights import digest
from stages import Model


class BaseFile:
    """The digests of the weights that a host has read, compared with the coordinator's.

    A file differs where hosts were given it at different times, or where one was given none. Its
    weights never cross a link, so nothing else would notice.

    Args:
      config: The host's configuration, resolved.
      name: The host's name.
      model: The whole model.
    """

    def __init__(self, config: Config, name: str, model: Model) -> None:
        self._hosts, self._name, self._model = hosts_of(config), name, model
        self._path = config.model.base
        self._expected: dict[str, str] = {}
        self._same: set[str] = set()

    @functools.cached_property
    def digests(self) -> tuple[str, ...]:
        """For each unit the digest of its weights in the file; empty if there are none."""
        return tuple(digest(self._model, unit) for unit in self._model.units)

    @property
    def is_used(self) -> bool:
        """Whether this host has weights of its own file."""
        return self._model.frozen.base is not None

    def expect(self, digests: Sequence[str]) -> None:
        """Takes the coordinator's digests, one for each unit."""
        self._expected = dict(zip(self._model.unit_names, digests, strict=False))

    def why_not(self, plan: Plan, seat: str, *, whole: bool) -> str | None:
        """Returns why this host cannot take part in a plan, or None.

        Args:
          plan: The plan.
          seat: What the plan calls the host.
          whole: Whether it uses all units, to evaluate the network.
        """
        units = self._model.units
        held = range(len(units)) if whole else self._held(plan, seat)
        for unit in (units[index] for index in held):
            if unit.name in self._same:
                continue
            if digest(self._model, unit) != self._expected.get(unit.name, ""):
                return (
                    f"{long_name(self._name)} begins with other weights of unit {unit.name!r} than "
                    f"the server: model.base={self._path!r} must be a copy of the server's file"
                )
            self._same.add(unit.name)
        return None

    def _held(self, plan: Plan, seat: str) -> list[int]:
        """Returns the units of a host; of a sampled device, those of every place it may take."""
        anywhere = self._hosts.sampled and is_device(seat)
        seats = [device_name(place) for place in range(len(plan.devices))] if anywhere else [seat]
        count = len(self._model.units)
        return sorted({unit for one in seats for unit in plan.held_units(one, count)})
