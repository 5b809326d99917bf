"""What a run promises about the records or users whose data it trains on.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses

from pipar_jax.config.schema import option

UNITS_OF_PRIVACY = ("record", "user")
LABEL_PROTECTION = ("unprotected", "randomised", "home")
#: Of these, ``pld`` needs the extra ``privacy``.
ACCOUNTANT_NAMES = ("exact", "rdp", "pld")


@dataclasses.dataclass(slots=True)
class PrivacyConfig:
    """Differential privacy of what leaves the devices; off unless epsilon or noise is set."""

    epsilon: float | None = option(
        None,
        "budget of each device: the noise is calibrated to it, and the run stops before it is "
        "exceeded; none: no budget",
        above=0,
    )
    delta: float = option(1e-5, "delta of the guarantee; below 1 / samples", above=0, below=1)
    noise: float | None = option(
        None,
        "noise multiplier: standard deviation of the noise, divided by the clip; none: calibrated "
        "to epsilon",
        above=0,
        at_most=1e6,
    )
    unit: str = option(
        "record",
        "what is protected: each record of a device, or a device's whole data (user; fl only)",
        choices=UNITS_OF_PRIVACY,
    )
    activation_clip: float = option(
        0.0,
        "methods with a cut: norm to which a sample's activation is clipped",
        at_least=0,
        at_most=1e12,
    )
    update_clip: float = option(
        0.0,
        "norm to which an example's gradient on the device (unit=record) or a device's update "
        "(unit=user) is clipped",
        at_least=0,
        at_most=1e12,
    )
    cotangent_clip: float = option(
        0.0,
        "labels=home under a cut: norm to which the cotangent of a sample's loss is clipped that "
        "leaves the device's last stage",
        at_least=0,
        at_most=1e12,
    )
    clip_quantile: float | None = option(
        None,
        "unit=user: update_clip is the first round's; from then on it follows this quantile of the "
        "norms of updates, known from a noised count of those within it; none: it stays",
        above=0,
        below=1,
    )
    clip_rate: float = option(
        0.2,
        "clip_quantile: learning rate of the logarithm of the clip, a round",
        above=0,
        at_most=10,
    )
    count_noise: float | None = option(
        None,
        "clip_quantile: standard deviation of the noise on the count; none: five times the noise "
        "multiplier, which leaves updates 0.99 of what they may cost",
        above=0,
        at_most=1e6,
    )
    noise_at: str = option(
        "device",
        "unit=user: who adds noise to updates; with server, devices trust the server",
        choices=("device", "server"),
    )
    labels: str = option(
        "unprotected",
        "methods with a cut: labels are sent as they are; randomised once for all; or stay on the "
        "device (home: only where the last stage does)",
        choices=LABEL_PROTECTION,
    )
    label_epsilon: float | None = option(
        None, "labels=randomised: epsilon of the randomised response", above=0
    )
    accountant: str = option(
        "exact",
        "how epsilon is computed: the closed form for Gaussian releases, by Renyi divergences, or "
        "by privacy loss distributions of the library dp-accounting",
        choices=ACCOUNTANT_NAMES,
    )
    reproducible: bool = option(
        False, "NOT PRIVATE: draw all noise from the seed, so that runs repeat bit for bit"
    )

    @property
    def on(self) -> bool:
        """Whether a run is private."""
        return self.epsilon is not None or self.noise is not None

    @property
    def of_users(self) -> bool:
        """Whether whole users are protected."""
        return self.on and self.unit == "user"

    @property
    def of_records(self) -> bool:
        """Whether single records are protected."""
        return self.on and self.unit == "record"
