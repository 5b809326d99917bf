"""How many steps each host was told of when it first prepared, from which schedules take a length.

A schedule of the learning rate is as long as the devices have steps that a host knows when it
prepares. Devices that join later have another number, and must not change what others go on with:
neither when a host comes back, nor when the run is resumed and all of them are known at once.
"""

from __future__ import annotations

from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.roles.population import Population


class PreparedSteps:
    """The steps of an epoch in each place, as each host learns them.

    Args:
      population: The devices that have joined.
      places: How many places a cohort has.
      sampled: Whether any device may take any place.
      kept: What ``facts`` was in the part of the run before this one, if it was kept.
    """

    def __init__(
        self, population: Population, places: int, *, sampled: bool, kept: JsonMapping | None
    ) -> None:
        self._population, self._places, self._sampled = population, places, sampled
        #: Devices in the order in which they joined, and for each host how many there were.
        self._order: list[int] = [] if kept is None else list(kept["order"])
        self._known: dict[str, int] = {} if kept is None else dict(kept["known"])

    def of(self, name: str) -> list[int]:
        """Returns the steps in each place; of places whose devices are not known, the most of any.

        Args:
          name: The host that prepares; a device has joined before.
        """
        there = set(self._order)
        self._order += [one.index for one in self._population if one.index not in there]
        known = self._order[: self._known.setdefault(name, len(self._order))]
        steps = {index: self._population[index].steps for index in known}
        most = max(steps.values())
        if self._sampled:
            return [most] * self._places
        return [steps.get(place, most) for place in range(self._places)]

    @property
    def facts(self) -> JsonObject:
        """What a checkpoint holds of it, JSON-ready."""
        return {"order": list(self._order), "known": dict(self._known)}
