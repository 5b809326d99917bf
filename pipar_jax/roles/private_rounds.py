"""The coordinator's side of a private run: what devices have released, and when it has to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipar_jax.aggregation.aggregator import Contribution, Variables
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.privacy import policy
from pipar_jax.privacy.ledger import PrivacyLedger
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.privacy.policy import Guarantee
from pipar_jax.privacy.spending import Entry, Spending
from pipar_jax.protocol.messages import Stored
from pipar_jax.roles.population import Population, Registered
from pipar_jax.roles.timetable import Timetable
from pipar_jax.runtime.update_transforms import UpdateNoise, arrive, update_transforms
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, Plan, device_name, host_index, is_device
from pipar_jax.training.replica import Noise


class PrivateRounds:
    """Follows what the devices of a run release; of a run without privacy it does nothing.

    What is said here of a device is at least what its own ledger says: steps that it was told to
    take count whether or not it took them.

    Args:
      config: Resolved configuration.
      plan: The plan.
      population: The devices.
      table: The timetable, which says how many steps are planned.
    """

    def __init__(
        self, config: Config, plan: Plan, population: Population, table: Timetable
    ) -> None:
        self._config, self._privacy, self._plan = config, config.privacy, plan
        self._population, self._table = population, table
        self._spendings: dict[int, Spending] = {}
        self._more: dict[int, float] = {}  # what ledgers have beyond what was told here
        self._guarantees: dict[tuple[int, int], Guarantee] = {}
        self._epsilons: dict[str, float] = {}
        self._noise: UpdateNoise | None = None
        if config.privacy.of_users and config.privacy.noise_at == "server":
            self._noise = ServerNoise(config)
        self._transforms = update_transforms(config, self._noise)

    def promise(self) -> JsonObject | None:
        """Returns the event that says what is protected and with how much noise, or None."""
        if not self._privacy.on:
            return None
        words = policy.words(self._privacy, self._plan.devices[0].hosts)
        noise = {device_name(one.index): self._guarantee(one).noise for one in self._population}
        return {"event": "private", "words": list(words), "noise": noise}

    def close(self) -> None:
        """Closes the ledgers that are kept here. Idempotent."""
        if isinstance(self._noise, ServerNoise):
            self._noise.close()

    def why_not(
        self, index: int, devices: Sequence[int], taking: Sequence[int], spans: Sequence[Span]
    ) -> str | None:
        """Returns why a round would exceed a device's budget; else counts what it will release.

        Args:
          index: The round.
          devices: The device in each place.
          taking: The places that take part.
          spans: Their steps.
        """
        if not self._privacy.on or self._privacy.epsilon is None:
            return None
        coming = {}
        for place in taking:
            one = self._population[devices[place]]
            entries = self._entries(one, [span for span in spans if span.device == place])
            after = self._spending(one).after(entries)
            more = self._more.get(one.index, 0.0)
            if after.spent + more > self._guarantee(one).limit:
                return (
                    f"round {index} would bring device {one.index} above privacy.epsilon="
                    f"{self._privacy.epsilon:g}, since steps or rounds were repeated: what was "
                    "released counts"
                )
            coming[one.index] = after
        self._spendings.update(coming)
        return None

    def arrive(
        self,
        start: Variables,
        contributions: Sequence[Contribution],
        devices: Sequence[int],
        index: int,
    ) -> list[Contribution]:
        """Returns the contributions to an average after the transforms of updates.

        Args:
          start: The global weights of the round's start.
          contributions: The devices' weights.
          devices: Whose they are.
          index: The round.
        """
        if isinstance(self._noise, ServerNoise):
            self._noise.devices = tuple(devices)
        return arrive(self._transforms, start, contributions, index)

    def ended(self, said: Mapping[str, Stored]) -> None:
        """Takes what devices say of their ledgers after a round.

        Args:
          said: For each host what it said; devices by their names.
        """
        if not self._privacy.on:
            return
        for name, stored in said.items():
            if is_device(name) and self._noise is None:
                one = self._population[host_index(name)]
                known = self._spending(one).spent
                self._more[one.index] = max(0.0, stored.spent - known)
                self._epsilons[name] = stored.epsilon
        if isinstance(self._noise, ServerNoise):
            self._epsilons |= self._noise.epsilons()

    @property
    def epsilons(self) -> dict[str, float]:
        """For each device the epsilon of all that was released of it, as far as it is known."""
        return dict(self._epsilons)

    def _guarantee(self, one: Registered) -> Guarantee:
        key = one.samples, one.steps
        if key not in self._guarantees:
            times = math.ceil(self._table.steps(one.steps) / one.steps)
            if self._privacy.unit == "user":
                times = policy.rounds_of_users(self._config)
            hosts = self._plan.devices[0].hosts
            self._guarantees[key] = policy.guarantee(self._privacy, hosts, times)
        return self._guarantees[key]

    def _spending(self, one: Registered) -> Spending:
        """Returns what a device has released; of a run that goes on, all its steps so far."""
        if one.index not in self._spendings:
            made = Spending()
            before = [Span(0, 0, one.step)] if one.step else []
            for entry in self._entries(one, before, rounds=one.rounds):
                made.add(entry)
            self._spendings[one.index] = made
        return self._spendings[one.index]

    def _entries(self, one: Registered, spans: Sequence[Span], rounds: int = 1) -> list[Entry]:
        cost = self._guarantee(one).cost
        if self._privacy.unit == "user":
            return [policy.update_entry(cost)] * rounds
        return [
            policy.step_entry(self._config, one.samples, step, cost)
            for span in spans
            for step in range(span.first, span.stop)
        ]


class ServerNoise:
    """Noise that the server adds to the sum of updates, and the devices' ledgers that it keeps.

    Attributes:
      devices: The devices whose updates are in the next sum.

    Args:
      config: Resolved configuration.
    """

    def __init__(self, config: Config) -> None:
        self.devices: tuple[int, ...] = ()
        self._config, self._source = config, NoiseSource()
        rounds = policy.rounds_of_users(config)
        self._guarantee = policy.guarantee(config.privacy, (), rounds)
        self._ledgers: dict[int, PrivacyLedger] = {}

    def close(self) -> None:
        """Closes the ledgers. Idempotent."""
        for ledger in self._ledgers.values():
            ledger.close()

    def enter_update(self) -> None:
        """See ``UpdateNoise``."""
        for device in self.devices:
            if device not in self._ledgers:
                name = device_name(device)
                folder, *earlier = (
                    one / name
                    for one in state_folders(self._config.name, self._config.run, COORDINATOR)
                )
                self._ledgers[device] = PrivacyLedger(folder, tuple(earlier))
            entry = policy.update_entry(self._guarantee.cost)
            self._ledgers[device].add(entry, self._guarantee.releases)

    def update_noise(self, round_: int, numbers: int) -> Noise:
        """See ``UpdateNoise``."""
        source, privacy = self._source, self._config.privacy
        if privacy.reproducible:
            source = NoiseSource(reproducible_key(self._config.seed, COORDINATOR, round_))
        deviation = np.float32(self._guarantee.noise * privacy.update_clip)
        return Noise(source.bits(2, numbers), deviation)

    def epsilons(self) -> dict[str, float]:
        """Returns for each device the epsilon of what was released of it."""
        return {
            device_name(device): policy.epsilon_of(self._config.privacy, ledger.spending)
            for device, ledger in self._ledgers.items()
        }
