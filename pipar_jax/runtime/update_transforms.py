"""What happens to an update between a device's last step and the average: a list of transforms.

Each has a device's and a coordinator's half. A device applies its halves in the list's order before
its weights leave it (the links' codecs are the last of all), the coordinator its own in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pipar_jax.aggregation.aggregator import Contribution
from pipar_jax.aggregation.rules import MULTI_KRUM
from pipar_jax.config import Config, places
from pipar_jax.errors import RunError
from pipar_jax.training.replica import Noise, Variables
from stages.release import add_noise, bits_shape, bound_tree, clip_tree

#: From an update (trained weights minus those of the round's start) and the round's number.
OnDevice = Callable[[Variables, int], Variables]
#: From the devices' contributions, with updates for weights, and the round's number.
OnCoordinator = Callable[[list[Contribution], int], list[Contribution]]
#: Runs the compiled functions of both halves on an update, without effect: it compiles them.
Compile = Callable[[Variables], object]


def _nothing(update: Variables) -> None:
    """Compiles nothing."""


class UpdateTransform(NamedTuple):
    """A transform of updates.

    Attributes:
      on_device: Changes a device's update before it is sent.
      on_coordinator: Changes all updates of a round before they are averaged.
      compile: Compiles both, for an update of zeros; what is released or observed stays as it is.
    """

    on_device: OnDevice
    on_coordinator: OnCoordinator
    compile: Compile = _nothing


class UpdateNoise(Protocol):
    """Whoever adds noise to updates: a device, or the server to their sum."""

    @property
    def clip(self) -> float:
        """Norm to which the updates of this round are clipped."""

    def observe(self, within: jax.Array, round_: int) -> None:
        """Takes whether a device's update was within the clip, a bool."""

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
    privacy, aggregation = config.privacy, config.aggregation
    if not privacy.of_users:
        transforms = []
        if aggregation.rule == MULTI_KRUM:
            transforms.append(UpdateTransform(_as_it_is, _multi_krum(aggregation.liars)))
        if aggregation.update_bound:
            transforms.append(_clipping(aggregation.update_bound, twice=True))
        return tuple(transforms)
    # The noise of the server is its last half, since it goes through the list in reverse.
    at_device = privacy.noise_at == "device"
    transforms = [
        _bounding(noise, twice=not at_device),
        _planned(places(config.cohort, config.devices.count)),
    ]
    if at_device:
        return (*transforms, UpdateTransform(_noise(noise), _unchanged, _compile_noise(noise)))
    summed = UpdateTransform(_as_it_is, _summed_noise(noise), _compile_noise(noise))
    return (summed, *transforms)


def compile_transforms(transforms: Sequence[UpdateTransform], weights: Variables) -> None:
    """Compiles what updates pass, so that no round has to wait for it.

    Args:
      transforms: The transforms.
      weights: Weights of the shapes of an update.
    """
    if transforms:
        update = _difference(weights, weights)
        for transform in transforms:
            transform.compile(update)
        _sum(weights, update)


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
    made = [
        one._replace(params=_difference(one.params, {unit: start[unit] for unit in one.params}))
        for one in contributions
    ]
    for transform in reversed(transforms):
        made = transform.on_coordinator(made, round_)
    return [
        one._replace(params=_sum({unit: start[unit] for unit in one.params}, one.params))
        for one in made
    ]


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

    def on_coordinator(updates: list[Contribution], round_: int) -> list[Contribution]:
        del round_
        return [one._replace(params=_clipped(one.params, clip)) for one in updates]

    return UpdateTransform(
        on_device, on_coordinator if twice else _unchanged, lambda update: _clipped(update, clip)
    )


def _bounding(noise: UpdateNoise | None, *, twice: bool) -> UpdateTransform:
    """Clipping of users' updates, to a norm that may be another in every round.

    Args:
      noise: Who adds noise on this host.
      twice: Whether the coordinator clips as well; see ``_clipping``.
    """

    def on_device(update: Variables, round_: int) -> Variables:
        assert noise is not None
        clipped, within = _bounded(update, noise.clip)
        noise.observe(within, round_)
        bounded: Variables = clipped
        return bounded

    def on_coordinator(updates: list[Contribution], round_: int) -> list[Contribution]:
        del round_
        assert noise is not None
        return [one._replace(params=_clipped(one.params, noise.clip)) for one in updates]

    def compile_both(update: Variables) -> None:
        if noise is not None:
            _bounded(update, noise.clip)
            if twice:
                _clipped(update, noise.clip)

    return UpdateTransform(on_device, on_coordinator if twice else _unchanged, compile_both)


def _planned(count: int) -> UpdateTransform:
    """The planned divisor: a device that is not there counts with an update of zero.

    Who is there may depend on a user's data, and so would the divisor.
    """

    def on_coordinator(updates: list[Contribution], round_: int) -> list[Contribution]:
        del round_
        zero = updates[0]._replace(params=jax.tree.map(jnp.zeros_like, updates[0].params))
        return [*updates, *[zero] * (count - len(updates))]

    return UpdateTransform(_as_it_is, on_coordinator)


def _compile_noise(noise: UpdateNoise | None) -> Compile:
    def compile_it(update: Variables) -> None:
        if noise is not None:  # else another host adds it
            bits = np.zeros(bits_shape(_numbers(update)), np.uint32)
            _noised(update, Noise(bits, np.float32(0.0)))

    return compile_it


def _noise(noise: UpdateNoise | None) -> OnDevice:
    def on_device(update: Variables, round_: int) -> Variables:
        assert noise is not None
        noise.enter_update()
        return _noised(update, noise.update_noise(round_, _numbers(update)))

    return on_device


def _summed_noise(noise: UpdateNoise | None) -> OnCoordinator:
    """Noise on the sum, by adding it to one of the summands."""

    def on_coordinator(updates: list[Contribution], round_: int) -> list[Contribution]:
        assert noise is not None
        noise.enter_update()
        first = updates[0]
        made = noise.update_noise(round_, _numbers(first.params))
        return [first._replace(params=_noised(first.params, made)), *updates[1:]]

    return on_coordinator


def _multi_krum(liars: int) -> OnCoordinator:
    """Multi-Krum (Blanchard et al., NeurIPS 2017): leaves out the updates far from their nearest.

    Of n updates the n - liars with the smallest sums of squared distances to their n - liars - 2
    nearest ones are averaged.
    """

    def on_coordinator(updates: list[Contribution], round_: int) -> list[Contribution]:
        count = len(updates)
        if count < 2 * liars + 3:
            raise RunError(
                f"round {round_}: aggregation.rule=multi_krum with aggregation.liars={liars} needs "
                f"at least {2 * liars + 3} devices that finish, got {count}: lower liars, or raise "
                "cohort.quorum"
            )
        vectors = np.stack([_vector(one.params) for one in updates])
        # What is not finite is infinitely far from all others.
        with np.errstate(invalid="ignore", over="ignore"):
            squares = [np.sum(np.square(vectors - one), axis=1) for one in vectors]
        distances = np.stack(squares)
        distances[np.isnan(distances)] = np.inf
        np.fill_diagonal(distances, np.inf)
        scores = np.sort(distances, axis=1)[:, : count - liars - 2].sum(axis=1)
        chosen = np.sort(np.argsort(scores, kind="stable")[: count - liars])
        return [updates[int(i)] for i in chosen]

    return on_coordinator


def _vector(update: Variables) -> NDArray[np.float64]:
    """Returns all numbers of an update."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(update)])


def _as_it_is(update: Variables, round_: int) -> Variables:
    del round_
    return update


def _unchanged(updates: list[Contribution], round_: int) -> list[Contribution]:
    del round_
    return updates


_clipped, _bounded = jax.jit(clip_tree), jax.jit(bound_tree)


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
