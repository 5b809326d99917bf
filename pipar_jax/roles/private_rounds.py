"""The coordinator's side of a private run: what devices have released, and when it has to stop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import numpy as np

from pipar_jax.aggregation.aggregator import Contribution, Variables
from pipar_jax.config import Config, places
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import RunError
from pipar_jax.privacy import policy
from pipar_jax.privacy.accountant import ACCOUNTANTS
from pipar_jax.privacy.adaptive_clip import AdaptiveClip
from pipar_jax.privacy.ledger import LEDGER, PrivacyLedger
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.privacy.policy import Guarantee
from pipar_jax.privacy.spending import Entry, Spending
from pipar_jax.protocol.messages import Stored
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.population import Population, Registered
from pipar_jax.roles.timetable import Timetable
from pipar_jax.runtime.update_transforms import (
    arrive,
    compile_transforms,
    update_transforms,
)
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Plan,
    device_name,
    host_index,
    is_device,
)
from pipar_jax.training.replica import Noise
from stages.release import bits_shape


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
        self._told: dict[str, float] = {}  # what they came to when a device last spoke of its own
        self._guarantees: dict[tuple[int, int], Guarantee] = {}
        self._exhausted: dict[str, str] = {}  # whose budgets are spent, and why
        self._epsilons: dict[str, float] = {}
        self._noise: ServerNoise | None = None
        if config.privacy.of_users and config.privacy.noise_at == "server":
            self._noise = ServerNoise(config)
        self._transforms = update_transforms(config, self._noise)
        self._clip: AdaptiveClip | None = None
        if config.privacy.clip_quantile is not None:
            promised = policy.guarantee(config.privacy, (), policy.rounds_of_users(config))
            planned = places(config.cohort, config.devices.count)
            self._clip = AdaptiveClip(config.privacy, promised.count_noise, planned)

    def promise(self) -> JsonObject | None:
        """Returns the event that says what is protected and with how much noise, or None."""
        if not self._privacy.on:
            return None
        words = policy.words(self._privacy, self._plan.devices[0].hosts)
        noise = {device_name(one.index): self._guarantee(one).noise for one in self._population}
        return {
            "event": "private",
            "words": list(words),
            "noise": noise,
            # What was released before; labels that are given once are in it from the start.
            "epsilon": {
                name: epsilon for name, epsilon in self._epsilons.items() if self._told.get(name)
            },
        }

    @property
    def clip(self) -> float:
        """Norm to which updates are clipped in the next round, if that adapts; else 0."""
        return 0.0 if self._clip is None else self._clip.value

    @property
    def facts(self) -> JsonObject:
        """What a checkpoint holds of it, JSON-ready."""
        return {"clip": self.clip, "spent": dict(self._told)}

    def begin(self, facts: JsonMapping | None, present: Iterable[Identity]) -> dict[str, str]:
        """Goes on from what a checkpoint holds of an earlier part of the run.

        Args:
          facts: What it holds; None of a new run.
          present: The devices that have joined.

        Returns:
          The devices that cannot go on, as their ledgers lack what they have released, and why.
        """
        if facts is not None:
            self._told.update(facts["spent"])
            if self._clip is not None:
                self._clip.resume(facts["clip"])
        asked = {who.name: self.admit(who) for who in present}
        return {name: why_not for name, why_not in asked.items() if why_not is not None}

    def admit(self, who: Identity) -> str | None:
        """Takes what a device that joins says of its ledger, or what the server has for it.

        Returns:
          Why it is refused, or None. A device whose ledger lacks what this run has seen released
          would spend its budget twice, and what else was in the ledger nobody knows: it does not
          go on from the run's record alone.
        """
        if not self._privacy.on or not is_device(who.name):
            return None
        if who.name in self._exhausted:
            return f"its privacy budget is spent: {self._exhausted[who.name]}"
        known, spent, epsilon = self._told.get(who.name, 0.0), who.spent, who.epsilon
        one, folder = self._population[who.index], who.name
        if self._noise is not None:
            folder = f"{COORDINATOR}/{who.name}"
            try:
                spent, epsilon = self._noise.spent(who.index), self._noise.epsilon(who.index)
            except RunError as error:  # a ledger that cannot be read: its device stays out
                return str(error)
        if not spent and one.rounds:  # whatever a checkpoint of an earlier version says of it
            known = max(known, self._spending(one).spent)
        if not spent >= known * (1 - 1e-9):
            spends = ACCOUNTANTS[self._privacy.accountant]
            delta = self._privacy.delta
            return (
                f"its ledger comes to epsilon {spends(max(spent, 0.0), delta):.4g}, and this "
                f"run has seen it release {spends(known, delta):.4g}: restore "
                f"{LEDGER} in the folder hosts/{folder}, or begin a run under another name and "
                "account for both yourself"
            )
        self._take_ledger(who.name, spent, epsilon)
        return None

    def _take_ledger(self, name: str, spent: float, epsilon: float) -> None:
        """Takes what a device's ledger comes to, whoever keeps it."""
        one = self._population[host_index(name)]
        self._more[one.index] = max(0.0, spent - self._spending(one).spent)
        self._told[name] = max(spent, self._told.get(name, 0.0))
        if epsilon > 0:
            self._epsilons[name] = epsilon

    def close(self) -> None:
        """Closes the ledgers that are kept here. Idempotent."""
        if self._noise is not None:
            self._noise.close()

    def exhausted(
        self, index: int, devices: Sequence[int], taking: Sequence[int], spans: Sequence[Span]
    ) -> dict[str, str]:
        """Counts what a round will release, unless it would exceed a device's budget.

        Args:
          index: The round.
          devices: The device in each place.
          taking: The places that take part.
          spans: Their steps.

        Returns:
          The devices whose budgets it would exceed, and why.
        """
        if not self._privacy.on or self._privacy.epsilon is None:
            return {}
        coming, found = {}, {}
        for place in taking:
            one = self._population[devices[place]]
            entries = self._entries(one, [span for span in spans if span.device == place])
            after = self._spending(one).after(entries)
            more = self._more.get(one.index, 0.0)
            if after.spent + more > self._guarantee(one).limit:
                found[device_name(one.index)] = (
                    f"round {index} would bring device {one.index} above privacy.epsilon="
                    f"{self._privacy.epsilon:g}, since steps or rounds were repeated: what was "
                    "released counts"
                )
            coming[one.index] = after
        if not found:
            self._spendings.update(coming)
        self._exhausted.update(found)
        return found

    def compile(self, weights: Variables) -> None:
        """Compiles what updates pass before they are averaged.

        Args:
          weights: The global weights.
        """
        compile_transforms(self._transforms, weights)

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
        if self._noise is not None:
            self._noise.devices, self._noise.clip = tuple(devices), self.clip or self._noise.clip
        return arrive(self._transforms, start, contributions, index)

    def ended(self, said: Mapping[str, Stored], counted: Collection[str]) -> None:
        """Takes what devices say of their ledgers after a round, and of their updates.

        Args:
          said: For each host what it said; devices by their names.
          counted: Devices whose updates are in the average.
        """
        if not self._privacy.on:
            return
        if self._clip is not None:
            rounds = [said[name].round for name in counted]
            normal = 0.0
            if self._noise is not None and rounds:
                normal = self._noise.count_noise(rounds[0])
            self._clip.adapt([said[name].within for name in counted], normal)
        if self._noise is None:
            for name, stored in said.items():
                if is_device(name):
                    self._take_ledger(name, stored.spent, stored.epsilon)
            return
        for device in self._noise.devices:
            spent, epsilon = self._noise.spent(device), self._noise.epsilon(device)
            self._take_ledger(device_name(device), spent, epsilon)

    @property
    def figures(self) -> JsonObject:
        """What a round has come to, JSON-ready; nothing of a run without privacy."""
        if not self._privacy.on:
            return {}
        figures: JsonObject = {"epsilon": dict(self._epsilons), "delta": self._privacy.delta}
        if self._clip is not None:
            figures |= {"clip": self._clip.value, "within_clip": self._clip.share}
        return figures

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
      clip: Norm to which they are clipped.

    Args:
      config: Resolved configuration.
    """

    def __init__(self, config: Config) -> None:
        self.devices: tuple[int, ...] = ()
        self.clip = config.privacy.update_clip
        self._config, self._source = config, NoiseSource()
        rounds = policy.rounds_of_users(config)
        self._guarantee = policy.guarantee(config.privacy, (), rounds)
        self._ledgers: dict[int, PrivacyLedger] = {}

    def close(self) -> None:
        """Closes the ledgers. Idempotent."""
        for ledger in self._ledgers.values():
            ledger.close()

    def enter_update(self) -> None:
        """See ``UpdateNoise``.

        Raises:
          DiskError: A ledger cannot be written.
          RunError: A ledger cannot be read, or a device's budget does not allow it.
        """
        entry, privacy = policy.update_entry(self._guarantee.cost), self._config.privacy
        for device in self.devices:
            if self._ledger(device).spending.spent_after(entry) > self._guarantee.limit:
                raise RunError(
                    f"the average would release device {device} beyond privacy.epsilon="
                    f"{privacy.epsilon:g}, of which epsilon {self.epsilon(device):.4g} is spent: "
                    "the run ends here; releases of earlier parts of the run and repeated rounds "
                    "count"
                )
        for device in self.devices:
            self._ledger(device).add(entry, self._guarantee.releases)

    def _ledger(self, device: int) -> PrivacyLedger:
        """Returns the ledger of a device, which goes on where an earlier part of the run ended."""
        if device not in self._ledgers:
            config, name = self._config, device_name(device)
            folders = state_folders(config.name, config.run, COORDINATOR)
            folder, *earlier = (one / name for one in folders)
            self._ledgers[device] = PrivacyLedger(folder, tuple(earlier))
        return self._ledgers[device]

    def spent(self, device: int) -> float:
        """Returns what the releases of a device come to, as mu**2.

        Raises:
          RunError: Its ledger cannot be read, or is damaged.
        """
        return self._ledger(device).spending.spent

    def epsilon(self, device: int) -> float:
        """Returns the epsilon of what was released of a device.

        Raises:
          RunError: Its ledger cannot be read, or is damaged.
        """
        return policy.epsilon_of(self._config.privacy, self._ledger(device).spending)

    def update_noise(self, round_: int, numbers: int) -> Noise:
        """See ``UpdateNoise``."""
        deviation = np.float32(self._guarantee.noise * self.clip)
        return Noise(self._stream(round_).bits(*bits_shape(numbers)), deviation)

    def observe(self, within: jax.Array, round_: int) -> None:
        """See ``UpdateNoise``; devices do that."""

    def count_noise(self, round_: int) -> float:
        """Returns a standard normal number for the count of updates within the clip."""
        return self._stream(round_, "count").normal()

    def _stream(self, *what: object) -> NoiseSource:
        """Returns where the bits for something come from."""
        if not self._config.privacy.reproducible:
            return self._source
        return NoiseSource(reproducible_key(self._config.seed, COORDINATOR, *what))
