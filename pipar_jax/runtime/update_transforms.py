"""What happens to an update between a device's last step and the average: a list of transforms.

Each has a device's and a coordinator's half. A device applies its halves in the list's order before
its weights leave it (the links' codecs are the last of all), the coordinator its own in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pipar_jax.aggregation.aggregator import Contribution
from pipar_jax.config import Config, places
from pipar_jax.training.replica import Noise, Variables
from stages.release import add_noise, clip_tree

#: From an update (trained weights minus those of the round's start) and the round's number.
OnDevice = Callable[[Variables, int], Variables]
#: From the devices' updates and the round's number.
OnCoordinator = Callable[[list[Variables], int], list[Variables]]


class UpdateTransform(NamedTuple):
    """A transform of updates.

    Attributes:
      on_device: Changes a device's update before it is sent.
      on_coordinator: Changes all updates of a round before they are averaged.
    """

    on_device: OnDevice
    on_coordinator: OnCoordinator


class UpdateNoise(Protocol):
    """Whoever adds noise to updates: a device, or the server to their sum."""

    def enter_update(self) -> None:
        """Enters in the ledger that an update is about to leave."""

    def update_noise(self, round_: int, numbers: int) -> Noise:
        """Returns the noise of a round.

        Args:
          round_: The round.
          numbers: Numbers in an update.
        """


def update_transforms(config: Config, noise: UpdateNoise | None) -> tuple[UpdateTransform, ...]:
    """Returns the transforms of a run's updates, in the order of the device; usually none.

    Args:
      config: Resolved configuration.
      noise: Who adds noise on this host; None on a host that adds none.
    """
    privacy = config.privacy
    if not privacy.of_users:
        return ()
    # The noise of the server is its last half, since it goes through the list in reverse.
    at_device = privacy.noise_at == "device"
    transforms = [
        _clipping(privacy.update_clip, twice=not at_device),
        _planned(places(config.cohort, config.devices.count)),
    ]
    if at_device:
        return (*transforms, UpdateTransform(_noise(noise), _unchanged))
    return (UpdateTransform(_as_it_is, _summed_noise(noise)), *transforms)


def leave(
    transforms: Sequence[UpdateTransform], start: Variables, trained: Variables, round_: int
) -> Variables:
    """Returns a device's weights as they leave it.

    Args:
      transforms: The transforms.
      start: The weights of the round's start.
      trained: The weights of its end.
      round_: The round.
    """
    update = _difference(trained, start)
    for transform in transforms:
        update = transform.on_device(update, round_)
    left: Variables = _sum(start, update)
    return left


def arrive(
    transforms: Sequence[UpdateTransform],
    start: Variables,
    contributions: Sequence[Contribution],
    round_: int,
) -> list[Contribution]:
    """Returns the contributions to an average.

    Args:
      transforms: The transforms.
      start: The global weights of the round's start.
      contributions: The devices' contributions.
      round_: The round.
    """
    if not transforms or not contributions:
        return list(contributions)
    updates = [_difference(one.params, start) for one in contributions]
    for transform in reversed(transforms):
        updates = transform.on_coordinator(updates, round_)
    first = contributions[0]
    return [first._replace(params=_sum(start, one), weight=1.0) for one in updates]


def _clipping(clip: float, *, twice: bool) -> UpdateTransform:
    """Norm bounding.

    Args:
      clip: The bound.
      twice: Whether the coordinator clips as well, since it cannot know that a device did: not
        where devices add noise, of which the norm mostly is.
    """

    def on_device(update: Variables, round_: int) -> Variables:
        del round_
        clipped: Variables = _clipped(update, clip)
        return clipped

    def on_coordinator(updates: list[Variables], round_: int) -> list[Variables]:
        del round_
        return [_clipped(one, clip) for one in updates]

    return UpdateTransform(on_device, on_coordinator if twice else _unchanged)


def _planned(count: int) -> UpdateTransform:
    """The planned divisor: a device that is not there counts with an update of zero.

    Who is there may depend on a user's data, and so would the divisor.
    """

    def on_coordinator(updates: list[Variables], round_: int) -> list[Variables]:
        del round_
        zero = jax.tree.map(jnp.zeros_like, updates[0])
        return [*updates, *[zero] * (count - len(updates))]

    return UpdateTransform(_as_it_is, on_coordinator)


def _noise(noise: UpdateNoise | None) -> OnDevice:
    def on_device(update: Variables, round_: int) -> Variables:
        assert noise is not None
        noise.enter_update()
        return _noised(update, noise.update_noise(round_, _numbers(update)))

    return on_device


def _summed_noise(noise: UpdateNoise | None) -> OnCoordinator:
    """Noise on the sum, by adding it to one of the summands."""

    def on_coordinator(updates: list[Variables], round_: int) -> list[Variables]:
        assert noise is not None
        noise.enter_update()
        made = noise.update_noise(round_, _numbers(updates[0]))
        return [_noised(updates[0], made), *updates[1:]]

    return on_coordinator


def _as_it_is(update: Variables, round_: int) -> Variables:
    del round_
    return update


def _unchanged(updates: list[Variables], round_: int) -> list[Variables]:
    del round_
    return updates


_clipped = jax.jit(clip_tree)


@jax.jit
def _difference(left: Variables, right: Variables) -> Variables:
    found: Variables = jax.tree.map(jnp.subtract, left, right)
    return found


@jax.jit
def _sum(left: Variables, right: Variables) -> Variables:
    found: Variables = jax.tree.map(jnp.add, left, right)
    return found


def _noised(update: Variables, noise: Noise) -> Variables:
    noised: Variables = add_noise(update, noise.bits, noise.deviation)
    return noised


def _numbers(update: Variables) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(update))
