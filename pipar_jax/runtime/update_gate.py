"""The gate of a host's trained weights: an update passes its transforms, a user's state never."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pipar_jax.config import Config
from pipar_jax.errors import RunError
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.unit_state import States
from pipar_jax.runtime.update_transforms import compile_transforms, leave, update_transforms
from pipar_jax.training.replica import Replica, Variables


class UpdateGate:
    """Lets a host's weights out as its run allows it.

    Attributes:
      of_user: Whether they are a function of a user's data: only updates leave then.
      transforms: What an update passes before it leaves; none on most hosts.

    Args:
      name: The host's name.
      config: Resolved configuration.
      releases: What a device of a private run may send; None on any other host.
    """

    def __init__(self, name: str, config: Config, releases: Releases | None) -> None:
        self._name, self._private = name, releases is not None
        self.of_user = self._private and config.privacy.of_users
        self.transforms = () if releases is None else update_transforms(config, releases)
        self._given = True  # whether nothing was trained since its weights were given to it
        self._start: Variables = {}

    def note_given(self) -> None:
        """Records that the host was given weights."""
        self._given = True

    def check_state(self) -> None:
        """Checks that the host's state may leave as it is.

        Raises:
          RunError: It is a function of a user's data.
        """
        if self.of_user:
            raise RunError(
                f"{self._name} was asked for its state, which is a function of its user's data: a "
                "private run of unit=user sends updates alone"
            )

    def begin_round(self, index: int, replicas: Iterable[Replica]) -> None:
        """Checks that a round begins from weights that were given.

        Args:
          index: The round's number.
          replicas: The host's replicas.

        Raises:
          RunError: They were trained in a round that was given up.
        """
        if self.of_user and not self._given:
            raise RunError(
                f"{self._name} was told to begin round {index} from weights that it trained in "
                "a round that was given up: its update would be sent with them, and they are a "
                "function of its user's data"
            )
        self._given = False
        if self._private:
            for replica in replicas:
                replica.clear()  # else its sum could have an example twice, and more than its clip

    def keep_start(self, states: States) -> None:
        """Keeps the weights of a round's start: an update is what is trained from here on."""
        self._start = {
            unit: jax.tree.map(jnp.array, params) for unit, params in _params(states).items()
        }

    def compile(self, states: States) -> None:
        """Compiles what an update passes.

        Args:
          states: The weights that it will be of.
        """
        compile_transforms(self.transforms, _params(states))

    def leave(self, states: States, index: int) -> States:
        """Returns trained weights as they leave the host.

        Args:
          states: The weights, and what goes with them.
          index: The round's number.
        """
        left = leave(self.transforms, self._start, _params(states), index)
        return {key: state._replace(params=left[key[1]]) for key, state in states.items()}


def _params(states: States) -> Variables:
    """Returns the weights of states by unit."""
    return {unit: dict(state.params or {}) for (_, unit), state in states.items()}
