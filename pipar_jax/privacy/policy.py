"""What a private run releases of each record or user, how much noise that takes, and its words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipar_jax.config import Config, PrivacyConfig, aggregate_steps
from pipar_jax.errors import ConfigError
from pipar_jax.privacy.accountant import (
    ACCOUNTANTS,
    noise_beside_quantile,
    noise_for,
    release_cost,
    spent_for,
)
from pipar_jax.privacy.spending import Entry, Spending
from pipar_jax.schedule.plan import OWNER

ACTIVATIONS, GRADIENTS, COTANGENTS, UPDATES = "activations", "gradients", "cotangents", "updates"
#: Whether an update was within a clip that adapts: released with its update.
COUNTS = "counts"
#: Noise on the count where none is configured, as a multiple of the noise multiplier.
_COUNT_NOISE = 5.0


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What a device releases, with how much noise, and within which budget.

    Attributes:
      releases: Kinds of Gaussian releases, each once for every step (or, of users, every round).
      noise: The noise multiplier of each, counts excepted.
      releases_planned: How often the run is to release a record or user, all kinds together.
      limit: Largest ``spent`` of the budget; infinite without a budget.
      count_noise: Standard deviation of the noise on the count of updates within the clip.
    """

    releases: tuple[str, ...]
    noise: float
    releases_planned: int
    limit: float
    count_noise: float = 0.0

    @property
    def cost(self) -> float:
        """What a step (of users: a round) adds to ``spent``."""
        # A bit is one half away from its middle, so that its noise counts twice.
        return sum(
            release_cost(2 * self.count_noise if kind == COUNTS else self.noise)
            for kind in self.releases
        )


def has_cut(hosts: Sequence[str]) -> bool:
    """Returns whether a device's chain has other hosts than the device itself."""
    return any(host != OWNER for host in hosts)


def ends_at_home(hosts: Sequence[str]) -> bool:
    """Returns whether the last stage of a device's chain is on the device again."""
    return has_cut(hosts) and hosts[-1] == OWNER


def releases(privacy: PrivacyConfig, hosts: Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds of Gaussian releases of a device.

    Args:
      privacy: ``privacy.*``.
      hosts: The hosts of the device's stages in order.
    """
    if privacy.unit == "user":
        return (UPDATES,) if privacy.clip_quantile is None else (UPDATES, COUNTS)
    if not has_cut(hosts):
        return (GRADIENTS,)
    both = (ACTIVATIONS, GRADIENTS)
    return (*both, COTANGENTS) if releases_cotangents(privacy, hosts) else both


def releases_cotangents(privacy: PrivacyConfig, hosts: Sequence[str]) -> bool:
    """Returns whether cotangents that leave a device's last stage are clipped and noised."""
    return ends_at_home(hosts) and privacy.labels == "home"


def label_epsilon(privacy: PrivacyConfig) -> float:
    """Returns the epsilon of a run's randomised labels; 0 if they are not randomised."""
    return privacy.label_epsilon or 0.0


def guarantee(privacy: PrivacyConfig, hosts: Sequence[str], times: int) -> Guarantee:
    """Returns what a device of a private run promises.

    Args:
      privacy: ``privacy.*``.
      hosts: The hosts of the device's stages in order.
      times: How often a record is to be trained on (passes over the device's data), or a user to
        take part (rounds).

    Raises:
      ConfigError: The budget is not larger than that of the labels, or a count costs more than its
        update may.
    """
    kinds = releases(privacy, hosts)
    planned = times * sum(kind != COUNTS for kind in kinds)
    limit = float("inf")
    if privacy.epsilon is not None:
        limit = spent_for(gaussian_budget(privacy), privacy.delta, privacy.accountant)
    noise = privacy.noise
    if noise is None:
        noise = noise_for(gaussian_budget(privacy), privacy.delta, planned, privacy.accountant)
    if COUNTS not in kinds:
        return Guarantee(kinds, noise, planned, limit)
    # An update and its count cost together what an update alone would.
    count_noise = privacy.count_noise or _COUNT_NOISE * noise
    noise = noise_beside_quantile(noise, count_noise)
    return Guarantee(kinds, noise, planned, limit, count_noise)


def gaussian_budget(privacy: PrivacyConfig) -> float:
    """Returns the epsilon that randomised labels leave to everything else.

    Raises:
      ConfigError: They leave nothing.
    """
    assert privacy.epsilon is not None
    rest = privacy.epsilon - label_epsilon(privacy)
    if rest <= 0:
        raise ConfigError(
            f"privacy.label_epsilon={privacy.label_epsilon:g} leaves nothing of privacy.epsilon="
            f"{privacy.epsilon:g} for activations and weights: lower it, or raise privacy.epsilon"
        )
    return rest


def rounds_of_users(config: Config) -> int:
    """Returns how often a user is to take part in a run at most.

    Raises:
      ConfigError: That depends on how many samples the users have.
    """
    if config.run.rounds or not aggregate_steps(config.aggregation):
        return config.run.rounds or config.epochs
    raise ConfigError(
        f"privacy.unit=user counts rounds, and with aggregation.every={config.aggregation.every!r} "
        "their number depends on the devices' samples: set run.rounds, or aggregation.every=epoch"
    )


def epsilon_of(privacy: PrivacyConfig, spending: Spending) -> float:
    """Returns the epsilon of all that was released, for ``privacy.delta``."""
    gaussian = ACCOUNTANTS[privacy.accountant](spending.spent, privacy.delta)
    return gaussian + spending.label_epsilon


def step_entry(config: Config, samples: int, step: int, cost: float, data: str = "") -> Entry:
    """Returns what is entered before anything of a mini-batch is sent.

    Args:
      config: Resolved configuration.
      samples: Samples in the device's epoch.
      step: The device's step since the start of the run.
      cost: What it adds.
      data: What tells the device's data from others, where they may have been others before.
    """
    batch = config.data.batch_size
    epoch, within = divmod(step, -(-samples // batch))
    # With another seed, batch size or data the records are divided otherwise, so that a record may
    # be in any step.
    known = f"data {data}, " if data else ""
    return Entry(f"{known}seed {config.seed}, {samples} by {batch}, epoch {epoch}", within, cost)


def update_entry(cost: float) -> Entry:
    """Returns what is entered before a user's update is sent: all updates are of one user."""
    return Entry("updates", 0, cost)


def words(privacy: PrivacyConfig, hosts: Sequence[str]) -> tuple[str, ...]:
    """Returns what is protected from whom and what is not, a sentence each.

    Args:
      privacy: ``privacy.*``.
      hosts: The hosts of a device's stages in order.
    """
    if not privacy.on:
        return ()
    said = []
    if privacy.reproducible:
        said.append("NOT PRIVATE: privacy.reproducible draws the noise from the seed")
    if privacy.unit == "user":
        if privacy.noise_at == "server":
            said.append(
                "whether a device's data are these or others is protected from whoever sees the "
                "averaged weights, other devices included; the server sees every device's clipped "
                "update, and whether an adaptive clip was reached, and is trusted"
            )
        else:
            said.append(
                "whether a device's data are these or others is protected from the server and from "
                "all other devices"
            )
        if privacy.clip_quantile is not None:
            said.append(
                f"the clip of updates follows the {privacy.clip_quantile:g} quantile of their "
                "norms, of which nothing but a noised count is released"
            )
        said.append("labels stay on the device, and are protected with the rest of its data")
    else:
        sent = "activations and weights" if has_cut(hosts) else "weights"
        said.append(
            f"each record of a device is protected in the {sent} that leave the device, from all "
            "other hosts together; that a device takes part, and with how many samples, is not"
        )
        said.append(_of_labels(privacy, hosts))
    said.append("the test set, timings and message sizes are not protected")
    return tuple(said)


def _of_labels(privacy: PrivacyConfig, hosts: Sequence[str]) -> str:
    if not has_cut(hosts):
        return "labels stay on the device, and are protected with their records"
    if privacy.labels == "home":
        return (
            "labels stay on the device; what depends on them, cotangents and weights, is clipped "
            "and noised"
        )
    if privacy.labels == "randomised":
        return f"labels are randomised once, with epsilon {label_epsilon(privacy):g}"
    if ends_at_home(hosts):
        return (
            "labels are NOT protected: they stay on the device, but the cotangents that leave it "
            "are functions of them"
        )
    return "labels are NOT protected: they are sent as they are"
