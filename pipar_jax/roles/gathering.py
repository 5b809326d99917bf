"""Who takes part in the next round: present and ready devices, as chosen or as scripted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipar_jax.config import Config
from pipar_jax.config.cohorts import planned
from pipar_jax.config.membership_script import Attempt
from pipar_jax.errors import PeerError, RunError
from pipar_jax.protocol import messages
from pipar_jax.roles.mail import Mail
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.selection import CohortChooser
from pipar_jax.schedule.plan import device_name, host_index


class Cohort(NamedTuple):
    """The devices of a round.

    Attributes:
      devices: The device in each place.
      taking: The places whose devices take part, in order.
      planned: The script's entry for the round, if a script is replayed.
    """

    devices: tuple[int, ...]
    taking: tuple[int, ...]
    planned: Attempt | None


class Gathering:
    """Waits until enough devices are ready and chooses among them.

    Args:
      config: Resolved configuration.
      members: The devices and compute nodes.

    Raises:
      ConfigError: The user's selection function cannot be imported, or the script does not fit.
    """

    def __init__(self, config: Config, members: Membership) -> None:
        self._config, self._members = config, members
        self._places, self._sampled = members.hosts.places, members.hosts.sampled
        self._chooser = CohortChooser(config.cohort, config.devices.total, config.seed)
        self._preparing: set[str] = set()
        self._arrived: list[str] = []
        self._stopped: set[int] = set()  # devices that were dropped and may take part again
        self._script: deque[Attempt] | None = None
        if config.cohort.script:
            self._script = deque(planned(config.cohort, config.devices.total))
        members.listeners[messages.Dropped] = self._note_stopped

    def check_rounds(self, rounds: int) -> None:
        """Checks that a script has as many rounds as the run.

        Raises:
          RunError: The numbers differ.
        """
        if self._script is not None and (last := self._script[-1].round + 1) != rounds:
            raise RunError(
                f"cohort.script={self._config.cohort.script!r} has {last} rounds, and this run "
                f"{rounds}: give the run the same epochs, run.rounds and data"
            )

    def prepares(self, name: str) -> None:
        """Records that a device has been sent its share of the plan."""
        self._preparing.add(name)

    def busy(self) -> list[str]:
        """Returns the devices that prepare or have yet to stop: they cannot take a plan now."""
        self.settle()
        stopping = (one.index for one in self._members.population if one.present and not one.ready)
        return sorted({*self._preparing, *map(device_name, stopping)})

    @property
    def preparing(self) -> frozenset[str]:
        """The devices that have come in the midst of the run, and prepare the plan."""
        return frozenset(self._preparing)

    @property
    def replays(self) -> bool:
        """Whether the run replays a script."""
        return self._script is not None

    @property
    def upcoming(self) -> Attempt | None:
        """The script's next attempt, if a script is replayed."""
        return self._script[0] if self._script else None

    def await_enough(self, index: int) -> None:
        """Waits until enough devices are ready for a round, or those that a script names.

        Args:
          index: The round's number.

        Raises:
          PeerError: Too few devices are present, and the waiting time has elapsed; or a script has
            no further attempt.
        """
        if self.upcoming is not None:
            self._await_scripted(self.upcoming)
        elif self.replays:
            raise PeerError(
                f"cohort.script={self._config.cohort.script!r} has no further attempt at round "
                f"{index + 1}, which was undone: a device was lost that the script has in it"
            )
        else:
            self._await_number(index)

    def choose(self, index: int, attempt: int) -> Cohort | None:
        """Returns the next round's cohort; None if too few are ready any more.

        Args:
          index: The round's number.
          attempt: How often it has been begun before.

        Raises:
          ConfigError: The user's selection function failed.
        """
        planned = self.upcoming
        if planned is None:
            if len(self._members.population.ready()) < self.needed:
                return None
            cohort = self._choose(index, attempt)
        else:
            if self._missing(planned):
                return None
            assert self._script is not None
            self._script.popleft()
            cohort = Cohort(planned.cohort, _taking(planned), planned)
        again = self._stopped.intersection(cohort.devices[place] for place in cohort.taking)
        for device in sorted(again):
            self._members.tell({"event": "device_again", "device": device, "round": index})
        self._stopped -= again
        return cohort

    def _choose(self, index: int, attempt: int) -> Cohort:
        """Returns the devices that are chosen among those that are ready."""
        ready = self._members.population.ready()
        chosen = self._chooser.choose(index, attempt, ready)
        if not self._sampled:
            return Cohort(tuple(range(self._places)), chosen, None)
        # Unused places are named after devices that are not in the round.
        others = (one for one in range(self._config.devices.total) if one not in chosen)
        rest = tuple(next(others) for _ in range(self._places - len(chosen)))
        return Cohort((*chosen, *rest), tuple(range(len(chosen))), None)

    def go_on_without(self, spent: Mapping[str, str]) -> bool:
        """Lets devices go that cannot take part in the round for which they were chosen.

        Args:
          spent: Why, by the names of the devices.

        Returns:
          Whether the run goes on; otherwise, where it may not lose them, or too few others are
          ready, they are still there.
        """
        left = len(self._members.population.ready()) - len(spent)
        if not self._members.hosts.may_lose or self.replays or left < self.needed:
            return False
        for name, reason in spent.items():
            self._members.lose(name, PeerError(reason))
        return True

    def settle(self) -> None:
        """Records which devices have prepared their share of the plan."""
        found = self._members.early.take(messages.Prepared, self._preparing)
        self._preparing = {n for n in self._preparing if n in self._members.by_name and n not in
                           found}  # fmt: skip
        for name in found:
            self._members.population[host_index(name)].ready = True
        self._arrived += found

    def take_arrived(self) -> list[str]:
        """Returns the devices that have become ready since the last call and are still present."""
        arrived, self._arrived = self._arrived, []
        return [name for name in dict.fromkeys(arrived)
                if self._members.population.is_ready(name)]  # fmt: skip

    @property
    def needed(self) -> int:
        """The number of devices that must be ready before a round begins."""
        cohort = self._config.cohort
        least = cohort.quorum or cohort.first
        if not least and cohort.below != "end":
            least = min(cohort.min_devices or self._config.devices.count, self._places)
        return least or 1

    def _await_number(self, index: int) -> None:
        """Waits for enough devices."""
        wait = self._members.waiting("prepared")
        limit_s, told = time.monotonic() + self._config.cohort.wait_s, False
        while len(ready := self._members.population.ready()) < self.needed:
            coming = bool(self._preparing) or self._config.cohort.below != "end"
            if not coming or (time.monotonic() >= limit_s and not self._preparing):
                raise PeerError(
                    f"{len(ready)} devices are left for round {index + 1}, which needs "
                    f"{self.needed} (waited {self._config.cohort.wait_s:g} s): lower "
                    "cohort.quorum, raise cohort.wait_s, or let devices come back "
                    "(network.rejoin_s)"
                )
            if not told:
                told = True
                here = {one.device for one in ready}
                away = [device_name(one.index) for one in self._members.population
                        if one.index not in here]  # fmt: skip
                self._members.tell({"event": "waiting", "missing": away[:20]})
            wait.look(tuple(self._preparing))
            self.settle()

    def _await_scripted(self, planned: Attempt) -> None:
        """Waits for the devices that a script names."""
        wait = self._members.waiting("prepared")
        limit_s = time.monotonic() + self._config.network.join_timeout_s
        while missing := self._missing(planned):
            if time.monotonic() >= limit_s and not self._preparing:
                raise PeerError(
                    f"{', '.join(missing[:20])} are absent, but cohort.script has them in round "
                    f"{planned.round + 1}: start them, or raise network.join_timeout_s"
                )
            wait.look(tuple(self._preparing))
            self.settle()

    def _missing(self, planned: Attempt) -> list[str]:
        """Returns the devices of an attempt that are not ready."""
        names = (device_name(planned.cohort[place]) for place in _taking(planned))
        return [name for name in names if not self._members.population.is_ready(name)]

    def _note_stopped(self, mail: Mail[Any]) -> None:
        """Makes a device that was dropped from a round eligible for the next."""
        self._members.settle(mail.source, messages.Trained, messages.ClientModel)
        one = self._members.population[host_index(mail.source)]
        one.ready, one.current = True, False
        self._stopped.add(one.index)


def _taking(planned: Attempt) -> tuple[int, ...]:
    """Returns the places that take part in an attempt."""
    return tuple(dict.fromkeys(place for place, _, _ in planned.spans))
