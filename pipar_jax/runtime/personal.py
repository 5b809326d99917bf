"""A device's personal weights between rounds, wherever its replicas come and go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from comms.arrays import Array
from pipar_jax.config.checkpoints import PERSONAL
from pipar_jax.disk.files import make_folder, refused
from pipar_jax.errors import RunError
from pipar_jax.training import checkpoint
from pipar_jax.training.replica import Replica
from stages import Model
from stages.personal import personal_paths
from stages.trees import Arrays, PyTree

#: What their names begin with beside optimiser states on the device's disk.
_PREFIX = "personal/"


class PersonalWeights:
    """Personal weights as they were after the last round that counted.

    A device that is left out of a round goes back to them, one that joins again goes on from them,
    and its evaluations use them. Any thread may read them; the host's thread changes them.

    Attributes:
      run: The own name of the run that they belong to, which no other run has.
      rounds: How many rounds of it were over when they became what they are; 0 at the start.

    Args:
      model: The whole model.
      seed: Root seed, from which they are drawn.
    """

    def __init__(self, model: Model, seed: int) -> None:
        paths = personal_paths(model)
        params, _ = model.init(seed, only=paths)
        self._held: dict[str, dict[str, PyTree]] = {
            unit: {path: np.array(params[unit][path]) for path in sorted(of)}
            for unit, of in paths.items()
        }
        self._drawn = self._held
        self.run, self.rounds = "", 0

    def belong_to(self, run: str) -> None:
        """Notes the run that they are of; those of another one, which is over, are left behind.

        A device's process may outlive a run, and join the next.

        Args:
          run: The run's own name, which no other run has.
        """
        if self.run and run != self.run:
            self._held, self.rounds = self._drawn, 0
        self.run = run

    def take(self, replicas: Iterable[Replica], rounds: int) -> None:
        """Takes over what replicas have trained in a round that counts.

        Args:
          replicas: The device's replicas.
          rounds: How many rounds are over with it.
        """
        self.rounds = rounds
        params = {unit: arrays for one in replicas for unit, arrays in one.params.items()}
        self._held = {
            unit: {path: np.array(params[unit][path]) for path in held} if unit in params else held
            for unit, held in self._held.items()
        }

    def give(self, replicas: Iterable[Replica]) -> None:
        """Gives replicas copies, in place of what they have."""
        for replica in replicas:
            for unit in self._held.keys() & set(replica.stage.unit_names):
                weights = {unit: {**replica.params[unit], **self._held[unit]}}
                replica.load(weights, {unit: replica.state[unit]}, (unit,))

    def completed(self, params: Mapping[str, Arrays]) -> dict[str, Arrays]:
        """Returns shared weights together with the device's own."""
        return {unit: {**arrays, **self._held.get(unit, {})} for unit, arrays in params.items()}

    def tensors(self) -> dict[str, Array]:
        """Returns them by the names under which the device's disk has them."""
        return {
            f"{_PREFIX}{unit}/{path}": array
            for unit, held in self._held.items()
            for path, array in held.items()
        }

    def recall(self, tensors: Mapping[str, Array], rounds: int) -> None:
        """Takes over what ``tensors`` returned; what does not fit or is not there stays.

        Args:
          tensors: Arrays by name.
          rounds: How many rounds were over when they became what they are.
        """
        self.rounds = rounds
        self._held = {
            unit: {
                path: fitted if (fitted := tensors.get(f"{_PREFIX}{unit}/{path}")) is not None
                and (fitted.shape, fitted.dtype) == (array.shape, array.dtype) else array
                for path, array in held.items()
            }
            for unit, held in self._held.items()
        }  # fmt: skip

    def go_back(self, rounds: int, kept: Iterable[tuple[int, Mapping[str, Array]]]) -> None:
        """Goes back to the newest weights that are not of a later round, at last to the start's.

        Args:
          rounds: How many rounds are over.
          kept: What is on the disk: rounds, and arrays as ``tensors`` returned them.
        """
        if self.rounds > rounds:
            self._held, self.rounds = self._drawn, 0
        fitting = [one for one in kept if self.rounds < one[0] <= rounds]
        if fitting:
            number, tensors = max(fitting, key=lambda one: one[0])
            self.recall(tensors, number)

    def saved(self, folder: Path) -> list[tuple[int, dict[str, Array]]]:
        """Returns what ``save`` has written for this run, as ``go_back`` takes it; else nothing.

        Args:
          folder: The device's own folder in the run's.
        """
        path = folder / PERSONAL
        try:
            facts, arrays = checkpoint.facts(path), checkpoint.read_tensors(path)
        except RunError:
            return []
        if facts.get("run") != self.run or not isinstance(facts.get("rounds"), int):
            return []
        return [(facts["rounds"], {f"{_PREFIX}{name}": one for name, one in arrays.items()})]

    def save(self, folder: Path, host: str) -> None:
        """Writes those that were trained as a file that ``pipar_jax.load(run, device=…)`` reads.

        A file of another run is kept: hosts that are started by hand may use a folder again.

        Args:
          folder: The device's own folder in the run's.
          host: The device's name.

        Raises:
          DiskError: The file cannot be written.
        """
        if not self.rounds:
            return
        path = make_folder(folder) / PERSONAL
        if path.exists() and (other := run_of(path)) != self.run:
            with refused(path):
                path.rename(path.with_stem(f"{path.stem}-{other or 'unknown'}"))
        facts = {"host": host, "run": self.run, "rounds": self.rounds}
        checkpoint.save(path, self._held, {}, facts)


def run_of(path: Path) -> str | None:
    """Returns the own name of the run that a file of weights belongs to.

    Args:
      path: The file.

    Returns:
      The name, or None where there is no file, or none that says so.
    """
    try:
        run: str | None = checkpoint.facts(path).get("run")
    except RunError:
        return None
    return run
