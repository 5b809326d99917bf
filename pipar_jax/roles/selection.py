"""Which devices form a round's cohort: registered selection functions, and the user's own.

A selection is a function of the present devices, of the number wanted, and of random
numbers that depend on the seed and the round alone: the same devices give the same cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipar_jax.config import SELECTIONS, CohortConfig, places
from pipar_jax.config.plugins import find
from pipar_jax.errors import ConfigError, RunError

#: Separates the draws of cohorts from all other draws of a run's seed.
_STREAM = 0xC0


class Candidate(NamedTuple):
    """A device that is allowed to take part in a round.

    Attributes:
      device: Its index.
      samples: Samples that it trains on in an epoch.
      rounds: Number of rounds that it has taken part in.
    """

    device: int
    samples: int
    rounds: int


#: From candidates in index order, the number wanted and a generator to the chosen devices.
Selection = Callable[[Sequence[Candidate], int, np.random.Generator], Sequence[int]]


def uniform(
    candidates: Sequence[Candidate], count: int, draws: np.random.Generator
) -> Sequence[int]:
    """Returns a uniformly drawn subset of the devices."""
    chosen = draws.choice(len(candidates), count, replace=False)
    return [candidates[i].device for i in chosen]


def by_samples(
    candidates: Sequence[Candidate], count: int, draws: np.random.Generator
) -> Sequence[int]:
    """Returns devices drawn without replacement, with probabilities by their samples."""
    weights = np.array([one.samples for one in candidates], np.float64)
    chosen = draws.choice(len(candidates), count, replace=False, p=weights / weights.sum())
    return [candidates[i].device for i in chosen]


_REGISTERED: dict[str, Selection] = {"uniform": uniform, "by_samples": by_samples}
assert tuple(_REGISTERED) == SELECTIONS


class CohortChooser:
    """Chooses the cohort of each round.

    Args:
      cohort: The fields of ``cohort``.
      devices: Number of devices in the run.
      seed: Seed of the run.

    Raises:
      ConfigError: The user's function cannot be imported.
    """

    def __init__(self, cohort: CohortConfig, devices: int, seed: int) -> None:
        self._size, self._seed = places(cohort, devices), seed
        self._all = cohort.size == 0
        self._name = cohort.select
        self._select = _REGISTERED.get(self._name) or find(
            self._name.removeprefix("module:"), self._what, ConfigError
        )

    @property
    def _what(self) -> str:
        return f"the selection {self._name} of cohort.select"

    def choose(self, round_: int, attempt: int, candidates: Sequence[Candidate]) -> tuple[int, ...]:
        """Returns the devices of a round, in the order of their indices.

        Args:
          round_: The round's number.
          attempt: How often it has been begun before.
          candidates: The present devices, in any order.

        Raises:
          ConfigError: The user's function failed, named an absent device or a device twice,
            or did not return the number wanted.
        """
        ordered = sorted(candidates)
        if self._all:
            return tuple(one.device for one in ordered)
        if not ordered:
            raise RunError("cannot choose a cohort: no device is present")
        wanted = min(self._size, len(ordered))
        seed = np.random.SeedSequence((self._seed, _STREAM, round_, attempt))
        chosen = self._select(ordered, wanted, np.random.default_rng(seed))
        return self._checked(chosen, wanted, {one.device for one in ordered})

    def _checked(self, chosen: object, wanted: int, known: set[int]) -> tuple[int, ...]:
        """Returns the chosen devices in order, after checking them."""
        try:
            devices = [int(one) for one in chosen]  # type: ignore[attr-defined]
            whole = all(a == b for a, b in zip(devices, chosen, strict=True))  # type: ignore[call-overload]
        except (TypeError, ValueError):
            whole, devices = False, []
        if not whole:
            raise ConfigError(
                f"{self._what} returned {chosen!r:.120}, expected {wanted} indices of devices"
            )
        if strange := [one for one in devices if one not in known]:
            raise ConfigError(
                f"{self._what} returned device {strange[0]}, which is not among the {len(known)} "
                "that it was given"
            )
        if len(set(devices)) != len(devices):
            twice = next(one for one in devices if devices.count(one) > 1)
            raise ConfigError(f"{self._what} returned device {twice} twice")
        if len(devices) != wanted:
            raise ConfigError(f"{self._what} returned {len(devices)} devices, expected {wanted}")
        return tuple(sorted(devices))
